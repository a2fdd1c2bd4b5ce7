"""Error texts of torch that strategies read, checked against the installed torch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from strategies import UserError, check_count, user_name
from strategies.ddp import DDPStrategy
from strategies.torch_internals import is_lost_contact, unused_parameters
from tests.kit.processes import on_processes


def test_a_process_that_is_gone_is_told_from_an_error_of_the_user() -> None:
    @on_processes(2, seconds=30)
    def results() -> tuple[bool, bool]:
        strategy = DDPStrategy(device="cpu")
        strategy.setup()
        if dist.get_rank() == 1:
            dist.destroy_process_group()
            return True, True
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            return is_lost_contact(error), is_lost_contact(RuntimeError("a layer failed"))
        return False, False

    assert results[0] == (True, False)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.layer, self.never = (nn.Linear(2, 1, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_ddp_names_the_parameters_that_a_forward_left_out() -> None:
    @on_processes(2)
    def results() -> list[int]:
        wrapper = nn.parallel.DistributedDataParallel(Branch())
        wrapper(torch.ones(1, 2)).sum().backward()
        try:
            wrapper._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            return unused_parameters(error)
        return []

    assert results == [[0, 2]] * 2
    assert unused_parameters(RuntimeError("another error")) == []


@pytest.mark.parametrize("value", [True, 0, 1.0, "2", None])
def test_a_count_is_a_whole_number(value: object) -> None:
    with pytest.raises(UserError, match=f"^n={value!r}: expected a whole number of at least 1. Use 1.$"):
        check_count("n", value, why="Use 1.")


def test_names_are_those_of_the_user() -> None:
    assert user_name("_orig_mod.a._orig_mod.weight") == "a.weight"
