"""The textbook's loop without its division, which costs more than an engine does."""

import torch
from torch import nn

from tests.benchmarks.problem import Data, configured, loss_fn


def train(data: Data, K: int) -> nn.Module:
    model, optimizer = configured()
    scale = torch.tensor(1 / K)
    for i, (x, y) in enumerate(data, start=1):
        loss_fn(model(x), y).backward(gradient=scale)
        if i % K == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model
