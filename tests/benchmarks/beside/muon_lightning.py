import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW, Muon
from torch.utils.data import DataLoader, TensorDataset

x = torch.randn(500, 16)


class Sine(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim == 2]
        rest = [p for p in self.parameters() if p.ndim != 2]
        return Muon(matrices, lr=0.01), AdamW(rest, lr=0.001)

    def training_step(self, batch, batch_idx):
        self.manual_backward(mse_loss(self.layers(batch[0]), batch[1]) / 2)
        if (batch_idx + 1) % 2 == 0 or self.trainer.is_last_batch:
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=16, shuffle=True)
Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False).fit(Sine(), loader)
