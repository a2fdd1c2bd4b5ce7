import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.utils.data import TensorDataset
from torchmetrics.classification import BinaryAUROC, BinaryConfusionMatrix, BinaryF1Score

from engine import Task, Trainer
from engine.callbacks import EarlyStopping

x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
y = (x.sum(1, keepdim=True) > 0).float()


class Sign(Task):
    def __init__(self):
        self.validation_metrics = {
            "auroc": BinaryAUROC(),
            "f1": BinaryF1Score(),
            "confusion": BinaryConfusionMatrix(),
        }

    def configure_model(self):
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def configure_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def train_data(self):
        return TensorDataset(x[:500], y[:500])

    def validation_data(self):
        return TensorDataset(x[500:], y[500:])

    def loss(self, model, batch):
        scores = model(batch[0])
        self.log("accuracy", ((scores > 0) == batch[1]).float().mean())
        return bce(scores, batch[1])

    def evaluate(self, model, batch):
        scores = model(batch[0])
        for metric in self.validation_metrics.values():
            metric.update(scores, batch[1].int())
        self.log("loss", bce(scores, batch[1]))


trainer = Trainer(
    micro_batch_size=16,
    accumulate_grad_batches=2,
    max_epochs=10,
    keep_best="max:auroc",
    callbacks=EarlyStopping("auroc", mode="max"),
    loggers="csv",
    run_dir="sign",
)
trainer.fit(Sign())
