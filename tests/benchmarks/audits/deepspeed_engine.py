"""DeepSpeed: `initialize`, and `backward` and `step` for each micro-batch, as its page "Getting started" writes it."""

import deepspeed
import torch


def train(job):
    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": job.N, "gradient_accumulation_steps": job.K}
    engine, _, loader, _ = deepspeed.initialize(
        model=job.model,
        optimizer=torch.optim.SGD(job.model.parameters(), lr=0.1),
        training_data=job.dataset,
        config=config,
    )
    for _ in range(job.epochs):
        for batch in loader:
            loss = job.loss(engine, batch)
            engine.backward(loss)
            engine.step()
