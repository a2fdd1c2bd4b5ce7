"""Lightning: a `LightningModule`, and `accumulate_grad_batches` of its `Trainer`."""

import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, DistributedSampler


class Module(LightningModule):
    def __init__(self, job):
        super().__init__()
        self.model, self.job = job.model, job

    def training_step(self, batch, batch_idx):
        return self.job.loss(self.model, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(job, module=Module):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    varies = len(job.schedule) > 1
    trainer = Trainer(
        accelerator="cpu", devices=job.P, strategy="ddp" if job.P > 1 else "auto", max_epochs=job.epochs,
        accumulate_grad_batches=1 if varies else job.K,
        callbacks=[GradientAccumulationScheduler(job.schedule)] if varies else [], default_root_dir=job.folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    sampler = DistributedSampler(job.dataset, job.P, job.rank, shuffle=False)
    trainer.fit(module(job), DataLoader(job.dataset, batch_size=job.N, sampler=sampler))
