"""Lightning Fabric, by its guide "Efficient Gradient Accumulation"."""

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader


def train(job):
    fabric = Fabric(accelerator="cpu", devices=job.P, strategy="ddp" if job.P > 1 else "auto")
    fabric.launch()
    model, optimizer = fabric.setup(job.model, torch.optim.SGD(job.model.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(job.dataset, batch_size=job.N))
    for _ in range(job.epochs):
        for i, batch in enumerate(loader, 1):
            is_accumulating = i % job.K != 0
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                loss = job.loss(model, batch)
                fabric.backward(loss / job.K)
            if not is_accumulating:
                optimizer.step()
                optimizer.zero_grad()
