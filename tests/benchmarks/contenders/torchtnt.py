"""TorchTNT: an AutoUnit, run by `train`."""

import sys
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

from tests.benchmarks.problem import Data, loss_fn, make_model, make_optimizer

if find_spec("pkg_resources") is None:  # torchtnt imports it, without a use; setuptools has it no longer
    sys.modules["pkg_resources"] = ModuleType("pkg_resources")

from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.state import State
from torchtnt.framework.train import train as run


class Unit(AutoUnit[tuple[Tensor, Tensor]]):
    def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> tuple[torch.optim.Optimizer, None]:
        return make_optimizer(module), None

    def compute_loss(self, state: State, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = data
        output = self.module(x)
        return loss_fn(output, y), output


def train(data: Data, K: int) -> nn.Module:
    unit = Unit(module=make_model(), device=torch.device("cpu"), gradient_accumulation_steps=K)
    run(unit, data, max_epochs=1)
    return unit.module
