import torch

from engine import Task, Trainer
from engine.losses import cross_entropy
from tests.benchmarks.beside.common import TEXTS, Reader, padded


class Next(Task):
    def configure_model(self):
        return Reader()

    def configure_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.5)

    def train_data(self):
        return TEXTS

    def collate(self, texts):
        return padded(texts)

    def loss(self, model, text):
        return cross_entropy(model(text[:, :-1]), text[:, 1:])


trainer = Trainer(micro_batch_size=4, effective_batch_size=16, max_epochs=2, shuffle=False)
trainer.fit(Next())
result = trainer.model.scores.weight.detach()
