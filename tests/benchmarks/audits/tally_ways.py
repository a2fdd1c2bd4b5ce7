"""Tally by three ways: a dataset, a stream of ready micro-batches, and a loop of one's own; and its bare token mean."""

import torch

from engine import Accumulator, GradientAccumulationScheduler, Loss, Task, Trainer
from strategies import DDPStrategy, SingleDeviceStrategy


class Job(Task):
    def __init__(self, job, data):
        self.job, self.data = job, data

    def configure_model(self):
        return self.job.model

    def configure_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def train_data(self):
        return self.data

    def loss(self, model, batch):
        return Loss(self.job.loss_sum(model, batch), batch[2].sum())


class Stream:
    """Ready micro-batches, of which nobody knows how many there are."""

    def __init__(self, micro_batches):
        self.micro_batches = micro_batches

    def __iter__(self):
        return iter(self.micro_batches)


class BareMean(Job):
    def loss(self, model, batch):
        return self.job.loss(model, batch)


def fit(job, task):
    windows = (
        {"callbacks": GradientAccumulationScheduler(job.schedule)}
        if len(job.schedule) > 1
        else {"accumulate_grad_batches": job.K}
    )
    saves = {} if job.stop_after is None and not job.resumes else {"run_dir": f"{job.folder}/run"}
    trainer = Trainer(micro_batch_size=job.N, max_epochs=job.epochs, max_updates=job.stop_after, **windows, **saves)
    trainer.fit(task)


def dataset(job):
    fit(job, Job(job, job.dataset))


def stream(job):
    fit(job, Job(job, Stream(job.micro_batches)))


def bare_token_mean(job):
    fit(job, BareMean(job, job.dataset))


def own_loop(job):
    strategy = DDPStrategy() if job.P > 1 else SingleDeviceStrategy()
    strategy.setup()
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)
    model = strategy.prepare(job.model)
    windows = {"micro_batch_size": job.N, "accumulate_grad_batches": job.K}
    accumulator = Accumulator(strategy, model, optimizer, job.dataset, **windows)
    for epoch in range(job.epochs):
        for window in accumulator.windows(epoch):
            for batch in window:
                window.backward(Loss(job.loss_sum(model, batch), batch[2].sum()))
            window.update()
    strategy.teardown()
