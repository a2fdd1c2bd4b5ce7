"""PyTorch-Ignite: its supervised trainer, with the `auto_` helpers of its distributed guide."""

import ignite.distributed as idist
import torch
from ignite.engine import create_supervised_trainer
from torch.utils.data import DistributedSampler


def prepare(batch, device, non_blocking):
    x, y, weight = batch
    return x, (y, weight)


def train(job):
    if job.P > 1:
        idist.initialize("gloo")
    model = idist.auto_model(job.model)
    optimizer = idist.auto_optim(torch.optim.SGD(job.model.parameters(), lr=0.1))
    sampler = DistributedSampler(job.dataset, job.P, job.rank, shuffle=False)
    loader = idist.auto_dataloader(job.dataset, batch_size=job.N * job.P, sampler=sampler)
    trainer = create_supervised_trainer(
        model, optimizer, lambda guess, target: job.loss(lambda _: guess, (None, *target)),
        prepare_batch=prepare, gradient_accumulation_steps=job.K,
    )  # fmt: skip
    trainer.run(loader, max_epochs=job.epochs)
