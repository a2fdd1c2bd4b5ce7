"""TorchTNT: an `AutoUnit`, run by its `train`."""

import sys
from importlib.util import find_spec
from types import ModuleType

import torch
from torch.utils.data import DataLoader, DistributedSampler

if find_spec("pkg_resources") is None:  # torchtnt imports it, without a use; setuptools has it no longer
    sys.modules["pkg_resources"] = ModuleType("pkg_resources")

from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.train import train as run
from torchtnt.utils import init_from_env


class Unit(AutoUnit):
    def configure_optimizers_and_lr_scheduler(self, module):
        return torch.optim.SGD(module.parameters(), lr=0.1), None

    def compute_loss(self, state, data):
        return self.job.loss(self.module, data), None


def train(job):
    device = init_from_env(device_type="cpu", pg_backend="gloo")
    strategy = "ddp" if job.P > 1 else None
    unit = Unit(module=job.model, device=device, strategy=strategy, gradient_accumulation_steps=job.K)
    unit.job = job
    sampler = DistributedSampler(job.dataset, job.P, job.rank, shuffle=False)
    run(unit, DataLoader(job.dataset, batch_size=job.N, sampler=sampler), max_epochs=job.epochs)
