"""A generator and a critic that learn in turn: each has a strategy, an optimizer and an `Accumulator` of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from engine import Accumulator
from launch.recipes.digits.task import Digits
from strategies import resolve

NOISE = 16
"""Numbers that the generator makes an image of."""


def networks() -> tuple[nn.Module, nn.Module]:
    """Return a generator, from noise to 8 x 8 pixels, and a critic, from pixels to the logit of "real"."""
    generator = nn.Sequential(nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
    critic = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    return generator, critic


def draw(images: Tensor) -> Tensor:
    """Return noise for as many images. The loop seeds it by the micro-batch's place, so P does not matter."""
    return torch.randn(len(images), NOISE, device=images.device)


def calls_it(critic: nn.Module, images: Tensor, real: bool) -> Tensor:
    """Return the critic's mean loss if all `images` are real, or if none is."""
    logits = critic(images)
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def train(
    N: int = 16,
    K: int = 4,
    epochs: int = 30,
    lr: float = 1e-3,
    noise: Callable[[Tensor], Tensor] = draw,
    dtype: torch.dtype = torch.float32,
    report: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """Return the trained generator and critic; `report` prints the critic's mean loss of each epoch."""
    torch.manual_seed(0)
    strategies = resolve("auto"), resolve("auto")
    for strategy in strategies:
        strategy.setup()
    images = Digits().train_data().tensors[0].flatten(1).to(dtype)
    generator, critic = (s.prepare(model.to(dtype)) for s, model in zip(strategies, networks(), strict=True))
    turns = [
        Accumulator(strategy, model, torch.optim.Adam(model.parameters(), lr, (0.5, 0.999)), images, N, K, seed=seed)
        for seed, (strategy, model) in enumerate(zip(strategies, (generator, critic), strict=True))
    ]
    for epoch in range(epochs):
        losses = []
        for generates, criticises in zip(*(turn.windows(epoch) for turn in turns), strict=True):
            for batch in criticises:
                made = generator(noise(batch)).detach()
                criticises.backward(calls_it(critic, batch, True) + calls_it(critic, made, False))
            losses.append(criticises.update().loss)
            critic.requires_grad_(False)  # the generator learns through it
            for batch in generates:
                generates.backward(calls_it(critic, generator(noise(batch)), True))
            generates.update()
            critic.requires_grad_(True)
        if report and strategies[0].rank == 0:
            print(f"epoch {epoch}: the critic's loss is {sum(losses) / len(losses):.3f}")
    for strategy in strategies[::-1]:
        strategy.teardown()
    return generator, critic
