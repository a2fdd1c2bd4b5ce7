"""The recipe of a bandit: its curve depends neither on the calls nor on the processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.recipes.digits_bandit.train import guesses, train
from tests.kit.processes import on_processes
from tests.kit.reference import parameters


def by_hand() -> Any:
    """One batch an update, with the mean over guesses and the mean over images in plain torch."""
    from launch.recipes.digits.task import Digits

    torch.manual_seed(0)
    pixels, labels = Digits().train_data().tensors
    policy = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10)).double()
    optimizer, curve = torch.optim.Adam(policy.parameters(), 3e-3), []
    for update in range(6):
        dice = torch.Generator().manual_seed(update)
        rows = torch.randint(len(pixels), (21,), generator=dice)
        luck = torch.rand(21, 4, generator=dice, dtype=torch.float64)
        x = pixels[rows].flatten(1).double()
        guessed = guesses(policy, x, luck)
        rewards = (guessed == labels[rows][:, None]).double()
        chances = policy(x).log_softmax(1)
        gains = (rewards - rewards.mean(1, keepdim=True)) * chances.gather(1, guessed)
        loss = 0.01 * (chances.exp() * chances).sum(1).mean() - gains.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(rewards.mean().item())
    return parameters(policy), curve


@pytest.mark.parametrize("P", [1, 2, 4])
def test_the_curve_does_not_depend_on_how_the_calls_are_split(P: int) -> None:
    wanted, curve = by_hand()

    @on_processes(P)
    def by_rank() -> list[Any]:
        found = [train(updates=6, images=21, calls=calls, dtype=torch.float64) for calls in (1, 3, 7)]
        return [(parameters(policy), curve) for policy, curve in found]

    for results in by_rank:
        for found, seen in results:
            assert seen == pytest.approx(curve, rel=1e-12)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)  # Adam amplifies rounding
