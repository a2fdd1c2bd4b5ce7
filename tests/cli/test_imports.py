"""Imports on demand: FSDP, pipelines and sympy, which take longer than torch, load only when asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = [
    "sympy",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch._dynamo",
    "strategies.pipeline",
]


def imported(source: str) -> list[str]:
    print_them = f"import sys, json; print(); print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{source}\n{print_them}"], capture_output=True, text=True, check=True, timeout=100
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("argument", ["--help", "--trainer.strategy=fspd"])
def test_help_and_refusals_import_no_strategy_that_is_not_asked_for(argument: str) -> None:
    assert imported(f"from engine.cli.main import main; main(['{argument}'])") == []


def test_a_strategy_is_imported_when_it_is_asked_for() -> None:
    assert "torch.distributed.fsdp" in imported("from strategies import resolve; resolve('fsdp')")
    assert "strategies.pipeline" in imported("from strategies import PipelineStrategy")
