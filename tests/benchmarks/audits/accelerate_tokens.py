"""Accelerate, by the section on variable size training samples of the same guide: it counts a window's tokens first."""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader


def train(job):
    one_each = DataLoaderConfiguration(even_batches=False)
    accelerator = Accelerator(gradient_accumulation_steps=job.K, cpu=True, dataloader_config=one_each)
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(job.model, optimizer, DataLoader(job.dataset, batch_size=job.N))
    for _ in range(job.epochs):
        batches = iter(loader)
        for start in range(0, len(loader), job.K):
            window = [next(batches) for _ in range(min(job.K, len(loader) - start))]
            tokens = accelerator.gather(sum(batch[2].sum() for batch in window)).sum().item()
            for i, batch in enumerate(window, 1):
                with model.no_sync() if i < len(window) and job.P > 1 else nullcontext():
                    loss = job.loss_sum(model, batch) * job.K * accelerator.num_processes / tokens
                    accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
