"""Hugging Face Accelerate: one's own loop; `accumulate` decides which calls of `step` are made."""

from accelerate import Accelerator
from torch import nn

from tests.benchmarks.problem import Data, configured, loss_fn


def train(data: Data, K: int) -> nn.Module:
    accelerator = Accelerator(gradient_accumulation_steps=K, cpu=True)
    model, optimizer = accelerator.prepare(*configured())
    for x, y in data:
        with accelerator.accumulate(model):
            loss = loss_fn(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)
