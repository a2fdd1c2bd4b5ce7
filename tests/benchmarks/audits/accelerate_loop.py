"""Accelerate, by its guide "Performing gradient accumulation"."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader


def train(job):
    accelerator = Accelerator(gradient_accumulation_steps=job.K, cpu=True)
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(job.model, optimizer, DataLoader(job.dataset, batch_size=job.N))
    for _ in range(job.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = job.loss(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
