"""The recipe of a GAN: each model is updated as by one big batch, whatever K and P are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from engine.order import shuffled
from launch.recipes.digits import Digits
from launch.recipes.digits_gan.train import NOISE, networks, train
from tests.kit.processes import on_processes

B, LR = 96, 1e-3
DTYPE = torch.float64
SHADE = torch.randn(64, NOISE, generator=torch.Generator().manual_seed(0), dtype=DTYPE)


def noise(images: Tensor) -> Tensor:
    """Noise that is a sample's own: it does not depend on how a window is cut."""
    return torch.sin(7 * images @ SHADE)


def by_hand() -> list[Tensor]:
    torch.manual_seed(0)
    images = Digits().train_data().tensors[0].flatten(1).to(DTYPE)
    models = [model.to(DTYPE) for model in networks()]
    generator, critic = models
    learners = [torch.optim.Adam(model.parameters(), LR, (0.5, 0.999)) for model in models]
    orders = [torch.tensor(list(shuffled(len(images), seed)(0))).split(B) for seed in (0, 1)]

    def loss(pixels: Tensor, target: float) -> Tensor:
        logits = critic(pixels)
        return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    for of_generator, of_critic in zip(*orders, strict=True):
        batch = images[of_critic]
        step(learners[1], models, loss(batch, 1.0) + loss(generator(noise(batch)), 0.0))
        step(learners[0], models, loss(generator(noise(images[of_generator])), 1.0))
    return [parameter.detach() for model in models for parameter in model.parameters()]


def step(optimizer: torch.optim.Optimizer, models: list[nn.Module], loss: Tensor) -> None:
    for model in models:
        model.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("P", "K"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_two_models_learn_in_turn_as_by_one_big_batch(P: int, K: int) -> None:
    expected = by_hand()

    @on_processes(P, group=P > 1)
    def results() -> list[Any]:
        models = train(B // (K * P), K, 1, LR, noise, DTYPE)
        return [parameter.detach() for model in models for parameter in model.parameters()]

    for found in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
