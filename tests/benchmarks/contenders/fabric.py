"""Lightning Fabric: one's own loop; Fabric places the model and says when to synchronise."""

from lightning.fabric import Fabric
from torch import nn

from tests.benchmarks.problem import Data, configured, loss_fn


def train(data: Data, K: int) -> nn.Module:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    module, bare_optimizer = configured()
    model, optimizer = fabric.setup(module, bare_optimizer)
    for i, (x, y) in enumerate(data, start=1):
        is_accumulating = i % K != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = loss_fn(model(x), y)
            fabric.backward(loss / K)
        if not is_accumulating:
            optimizer.step()
            optimizer.zero_grad()
    return module
