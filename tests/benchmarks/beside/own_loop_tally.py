from pathlib import Path

import torch

from engine import Accumulator, Batching
from engine.losses import cross_entropy
from strategies import resolve
from tests.benchmarks.beside.common import TEXTS, Reader, padded


class Padded(Batching):
    def collate(self, texts):
        return padded(texts)


strategy = resolve("auto")
strategy.setup()
model = strategy.prepare(Reader())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
options = {"effective_batch_size": 16, "max_epochs": 3, "max_updates": 8, "batching": Padded()}
accumulator = Accumulator(strategy, model, optimizer, TEXTS, micro_batch_size=4, **options)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, accumulator.total_updates)
accumulator.lr_scheduler = scheduler
path = Path("own.pt")
if path.exists():
    saved = torch.load(path, weights_only=True)
    strategy.load_state_dict(saved, optimizer)
    accumulator.load_state_dict(saved["windows"])
    scheduler.load_state_dict(saved["schedule"])
for epoch in range(accumulator.epoch, 3):
    for window in accumulator.windows(epoch):
        for text in window:
            window.backward(cross_entropy(model(text[:, :-1]), text[:, 1:]))
        window.update()
        saved = strategy.state_dict(optimizer)
        saved |= {"windows": accumulator.state_dict(), "schedule": scheduler.state_dict()}
        if strategy.rank == 0:
            torch.save(saved, path)
result = strategy.state_dict()["model"]["scores.weight"]
strategy.teardown()
