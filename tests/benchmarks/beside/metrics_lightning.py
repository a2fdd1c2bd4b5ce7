import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAUROC, BinaryConfusionMatrix, BinaryF1Score

x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
y = (x.sum(1, keepdim=True) > 0).float()


class Sign(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
        self.auroc, self.f1 = BinaryAUROC(), BinaryF1Score()
        self.confusion = BinaryConfusionMatrix()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        scores = self.model(batch[0])
        self.log("accuracy", ((scores > 0) == batch[1]).float().mean())
        return bce(scores, batch[1])

    def validation_step(self, batch, batch_idx):
        scores = self.model(batch[0])
        for name, metric in {"auroc": self.auroc, "f1": self.f1}.items():
            metric.update(scores, batch[1].int())
            self.log(name, metric)
        self.confusion.update(scores, batch[1].int())
        self.log("loss", bce(scores, batch[1]), sync_dist=True)

    def on_validation_epoch_end(self):
        for row, counts in enumerate(self.confusion.compute().tolist()):
            for column, count in enumerate(counts):
                self.log(f"confusion/{row}/{column}", count)
        self.confusion.reset()


trainer = Trainer(
    accelerator="cpu",
    accumulate_grad_batches=2,
    max_epochs=10,
    callbacks=[EarlyStopping("auroc", mode="max"), ModelCheckpoint(monitor="auroc", mode="max")],
    logger=CSVLogger("lightning"),
)
train = DataLoader(TensorDataset(x[:500], y[:500]), 16, shuffle=True)
trainer.fit(Sign(), train, DataLoader(TensorDataset(x[500:], y[500:]), 16))
