"""Jobs counted beside other engines: both programs do the same, and the page has the counts."""

from __future__ import annotations

import os
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.lines import JOBS, programs, table
from tests.kit import ROOT
from tests.kit.processes import run

NEEDS = {"lora_tally": "peft", "tokens_lightning": "lightning", "predict_lightning": "lightning"}
NEEDS |= {"lora_transformers": "peft", "own_loop_accelerate": "accelerate", "translation_tally": "transformers"}
NEEDS |= {"muon_lightning": "lightning", "gan_lightning": "lightning", "metrics_lightning": "lightning"}
NEEDS |= {"metrics_tally": "torchmetrics", "translation_transformers": "accelerate"}
SAME = {"tokens", "predict"}
"""Jobs whose results are equal: the others' engines draw their order, or their adapters, in another way."""


def result(program: Path, folder: Path) -> Any:
    """Run a program in a folder, and return what it calls `result`."""
    os.chdir(folder)
    if os.environ["WORLD_SIZE"] == "1":  # started as plain python starts it
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    found = runpy.run_path(str(program)).get("result")
    return found if isinstance(found, torch.Tensor | None) else None


@pytest.mark.parametrize("job", JOBS)
def test_the_programs_of_a_job_run(job: str, tmp_path: Path) -> None:
    results = {}
    for engine, program in programs(job).items():
        if (needed := NEEDS.get(program.stem)) is None or find_spec(needed):
            (tmp_path / engine).mkdir()
            (results[engine],) = run(1, result, program, tmp_path / engine, group=False)
            if results[engine] is not None:
                (again,) = run(1, result, program, tmp_path / engine, group=False)
                assert torch.equal(results[engine], again), "a second start resumes where the first has ended"
    if job in SAME:
        for found in results.values():
            torch.testing.assert_close(found, results["tally"], rtol=0, atol=1e-7)  # they divide by float32


@pytest.mark.parametrize("job", sorted(SAME))
def test_two_processes_come_to_the_same(job: str, tmp_path: Path) -> None:
    program = programs(job)["tally"]
    (alone,) = run(1, result, program, tmp_path, group=False)
    first, second = run(2, result, program, tmp_path)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-12)
    assert second is None or torch.equal(first, second)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs/comparison.md").read_text()
    assert table() in page, "run `python tests/benchmarks/lines.py`"
