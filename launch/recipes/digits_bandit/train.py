"""A policy that guesses digits and is only told whether it was right, in a loop of your own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import Accumulator, Loss
from launch.recipes.digits.task import Digits
from strategies import resolve


def guesses(policy: nn.Module, images: Tensor, luck: Tensor) -> Tensor:
    """Return one guess for each number of `luck` (images x answers, 0 to 1), drawn from the policy."""
    with torch.no_grad():
        below: Tensor = policy(images).softmax(1).cumsum(1)
    return (luck[:, :, None] > below[:, None]).sum(2).clamp(max=9)


def train(
    updates: int = 150,
    images: int = 64,
    answers: int = 4,
    calls: int = 2,
    lr: float = 3e-3,
    dtype: torch.dtype = torch.float32,
    report: bool = False,
) -> tuple[nn.Module, list[float]]:
    """Return the trained policy and the mean reward of each update; `report` prints every tenth.

    An update has `answers` guesses for each of its images, over all processes. Each process gives its share to
    `backward` in that many `calls`. The loss has two terms: one divided by the guesses, one by the images.
    """
    torch.manual_seed(0)
    strategy = resolve("auto")
    strategy.setup()
    pixels, labels = (column.flatten(1) if column.ndim > 1 else column for column in Digits().train_data().tensors)
    policy = strategy.prepare(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).to(dtype))
    accumulator = Accumulator(strategy, policy, torch.optim.Adam(policy.parameters(), lr))
    curve = []
    for update in range(updates):
        dice = torch.Generator().manual_seed(update)  # the same on all processes, whatever their number
        rows = torch.randint(len(pixels), (images,), generator=dice)
        luck = torch.rand(images, answers, generator=dice, dtype=dtype)
        own = slice(strategy.rank, None, strategy.processes)
        x, y = (strategy.to_device(part[rows[own]]) for part in (pixels.to(dtype), labels))
        guessed = guesses(policy, x, strategy.to_device(luck[own]))
        rewards = (guessed == y[:, None]).to(dtype)
        advantages = rewards - rewards.mean(1, keepdim=True)
        window = accumulator.open(weights={"policy": rewards.numel(), "entropy": len(x)})
        for part in torch.arange(len(x)).chunk(calls):
            chances = policy(x[part]).log_softmax(1)
            gain = (advantages[part] * chances.gather(1, guessed[part])).sum()
            order = (chances.exp() * chances).sum()
            window.log("reward", rewards[part].sum() / max(1, rewards[part].numel()), rewards[part].numel())
            terms = {"policy": Loss(-gain, rewards[part].numel()), "entropy": Loss(0.01 * order, len(part))}
            window.backward(terms, samples=len(part))
        curve.append(window.update().metrics["reward"])
        if report and strategy.rank == 0 and update % 10 == 9:
            print(f"update {update + 1}: mean reward of the last ten {sum(curve[-10:]) / 10:.3f}")
    strategy.teardown()
    return policy, curve
