import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from launch.recipes.digits import Digits


def loss(logits, target):
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


class GAN(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        self.critic = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def configure_optimizers(self):
        return [torch.optim.Adam(model.parameters(), 1e-3) for model in (self.generator, self.critic)]

    def training_step(self, batch, batch_idx):
        generates, criticises = self.optimizers()
        is_last = (batch_idx + 1) % 4 == 0 or self.trainer.is_last_batch
        self.toggle_optimizer(criticises)
        made = self.generator(torch.randn(len(batch), 16)).detach()
        self.manual_backward((loss(self.critic(batch), 1.0) + loss(self.critic(made), 0.0)) / 4)
        if is_last:
            criticises.step()
            criticises.zero_grad()
        self.untoggle_optimizer(criticises)
        self.toggle_optimizer(generates)
        made = self.generator(torch.randn(len(batch), 16))
        self.manual_backward(loss(self.critic(made), 1.0) / 4)
        if is_last:
            generates.step()
            generates.zero_grad()
        self.untoggle_optimizer(generates)


loader = DataLoader(Digits().train_data().tensors[0].flatten(1), batch_size=16, shuffle=True)
Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False).fit(GAN(), loader)
