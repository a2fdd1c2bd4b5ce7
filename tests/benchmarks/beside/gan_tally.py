import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from engine import Accumulator
from launch.recipes.digits import Digits
from strategies import resolve


def loss(logits, target):
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


images = Digits().train_data().tensors[0].flatten(1)
strategies = resolve("auto"), resolve("auto")
for strategy in strategies:
    strategy.setup()
generator = strategies[0].prepare(nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()))
critic = strategies[1].prepare(nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)))
turns = [
    Accumulator(strategy, model, torch.optim.Adam(model.parameters(), 1e-3), images, 16, accumulate_grad_batches=4)
    for strategy, model in zip(strategies, (generator, critic), strict=True)
]
for epoch in range(2):
    for generates, criticises in zip(*(turn.windows(epoch) for turn in turns), strict=True):
        for batch in criticises:
            made = generator(torch.randn(len(batch), 16)).detach()
            criticises.backward(loss(critic(batch), 1.0) + loss(critic(made), 0.0))
        criticises.update()
        critic.requires_grad_(False)
        for batch in generates:
            generates.backward(loss(critic(generator(torch.randn(len(batch), 16))), 1.0))
        generates.update()
        critic.requires_grad_(True)
