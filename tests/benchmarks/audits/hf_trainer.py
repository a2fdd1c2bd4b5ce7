"""`transformers.Trainer`: with a `compute_loss` of one's own, as its page "Trainer" writes it; and with a model that
divides by `num_items_in_batch`, as models of transformers do.
"""

import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments


def collate(samples):
    x, y, weight = default_collate(samples)
    return {"x": x, "y": y, "weight": weight}


def arguments(job, **options):
    return TrainingArguments(
        job.folder, per_device_train_batch_size=job.N, gradient_accumulation_steps=job.K, num_train_epochs=job.epochs,
        use_cpu=True, ddp_backend="gloo", optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        **options,
    )  # fmt: skip


def train(job):
    class Mean(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return job.loss(model, (inputs["x"], inputs["y"], inputs["weight"]))

    Mean(job.model, arguments(job), data_collator=collate, train_dataset=job.dataset).train()


def collate_labels(samples):
    """Three tokens a sample, of which the padded ones have the label -100: the trainer counts the others."""
    batch = collate(samples)
    valid = torch.arange(3) < batch.pop("weight")[:, None]
    return {**batch, "labels": valid.long() * 100 - 100}


class SumOverTokens(nn.Module):
    def __init__(self, job):
        super().__init__()
        self.model, self.job = job.model, job

    def forward(self, x, y, labels, num_items_in_batch=None, **kwargs):
        total = self.job.loss_sum(self.model, (x, y, (labels != -100).sum(1)))
        return {"loss": total / num_items_in_batch}


def train_tokens(job):
    options = arguments(job, accelerator_config={"even_batches": False})
    Trainer(SumOverTokens(job), options, data_collator=collate_labels, train_dataset=job.dataset).train()
