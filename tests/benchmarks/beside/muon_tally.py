import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW, Muon
from torch.utils.data import TensorDataset

from engine import Task, Trainer, parameter_groups

x = torch.randn(500, 16)


class Sine(Task):
    def configure_model(self):
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def configure_optimizer(self, model):
        matrices, rest = parameter_groups(model, matrices=lambda name, p: p.ndim == 2, rest="*")
        return [Muon([matrices], lr=0.01), AdamW([rest], lr=0.001)]

    def train_data(self):
        return TensorDataset(x, x.sum(1, keepdim=True).sin())

    def loss(self, model, batch):
        return mse_loss(model(batch[0]), batch[1])


Trainer(micro_batch_size=16, accumulate_grad_batches=2, max_epochs=3, gradient_clip_norm=1.0).fit(Sine())
