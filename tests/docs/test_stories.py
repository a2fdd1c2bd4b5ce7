"""The stories of docs/stories.md at a small size: what each of them claims."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.seeds import seed_everything
from launch.recipes.stdlib_lm import StdlibLM
from launch.recipes.stdlib_lm.functions import train_and_held_out
from tests.benchmarks.stories import kills, layouts, tokens
from tests.kit.processes import run


def test_three_layouts_are_one_run_by_tally_and_three_by_the_plain_loop() -> None:
    ours, theirs = (layouts.on_all_layouts(loop, torch.float64, 1, 300) for loop in (layouts.tally, layouts.plain))
    for losses, end in layouts.differences(ours):
        assert len(losses) == 3
        assert max(losses) < 1e-12
        assert end < 1e-12
    for losses, end in layouts.differences(theirs):
        assert max(losses) > 1e-3
        assert end > 1e-3


@pytest.mark.slow
def test_the_two_losses_of_a_window_of_padded_text() -> None:
    options = {"width": 16, "layers": 1, "heads": 2, "max_bytes": 64, "functions": 60}
    train_and_held_out(60)  # read once: the processes inherit it
    by_tokens, by_means = (run(2, tokens.fit, name, 0, options, 1)[0] for name in tokens.TASKS)
    task = StdlibLM(**options)
    seed_everything(0)
    model, data = task.configure_model(), task.train_data()
    window = list(task.order(0))[: tokens.P * tokens.K * tokens.N]
    pieces = [window[start : start + tokens.N] for start in range(0, len(window), tokens.N)]
    losses = [task.loss(model, task.collate([data[i] for i in piece])) for piece in pieces]
    over_bytes = sum(loss.sum.item() for loss in losses) / sum(loss.weight.item() for loss in losses)
    of_means = sum(loss.sum.item() / loss.weight.item() for loss in losses) / len(losses)
    assert by_tokens.records[0]["loss"] == pytest.approx(over_bytes, abs=1e-6)
    assert by_means.records[0]["loss"] == pytest.approx(of_means, abs=1e-6)
    assert abs(over_bytes - of_means) > 1e-4
    assert [r["effective_batch"] for r in by_tokens.records] == [r["effective_batch"] for r in by_means.records]
    assert by_tokens.held_out[-1] != by_means.held_out[-1]


def test_of_an_update_that_is_made_again_the_last_start_counts() -> None:
    lines = [
        {"start": 0, "update": 1, "epoch": 0, "seen": [0, 1]},
        {"start": 0, "update": 2, "epoch": 0, "seen": [2]},  # by one of two processes: the other was killed
        {"start": 1, "update": 2, "epoch": 0, "seen": [2, 3]},
        {"start": 1, "update": 3, "epoch": 1, "seen": [3]},
    ]
    assert kills.times_seen(lines) == [Counter({0: 1, 1: 1, 2: 1, 3: 1}), Counter({3: 1})]


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_run_is_the_one_left_alone(tmp_path: Path) -> None:
    starts = {"alone": (2,), "same": (2, 2, 2), "others": (2, 4, 1)}
    alone, same, others = (kills.run(tmp_path / name, processes, 60) for name, processes in starts.items())
    assert len(same.kills) == len(others.kills) == 2
    assert same.weights == alone.weights
    assert same.records == alone.records
    losses, end = kills.distance(alone, others)
    assert max(losses) < 1e-3
    assert end < 1e-3
    for outcome in (alone, same, others):
        counts = outcome.times_seen()
        assert set().union(*(epoch.values() for epoch in counts)) == {1}
        assert sum(epoch.total() for epoch in counts) == 2 * kills.SAMPLES + 14 * 64
