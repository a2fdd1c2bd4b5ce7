import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tests.benchmarks.beside.common import PADDING, TEXTS, Reader, padded


class Next(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Reader()
        self.tokens = torch.tensor(0)

    def training_step(self, text, index):
        self.tokens += (text[:, 1:] != PADDING).sum()
        return cross_entropy(self.model(text[:, :-1]), text[:, 1:], reduction="sum")

    def on_before_optimizer_step(self, optimizer):
        tokens = self.all_gather(self.tokens).sum()
        for parameter in self.parameters():
            parameter.grad *= self.trainer.accumulate_grad_batches * self.trainer.world_size / tokens
        self.tokens.zero_()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


module = Next()
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
trainer = Trainer(max_epochs=2, accumulate_grad_batches=4, **options)
trainer.fit(module, DataLoader(TEXTS, batch_size=4, collate_fn=padded))
result = module.model.scores.weight.detach()
