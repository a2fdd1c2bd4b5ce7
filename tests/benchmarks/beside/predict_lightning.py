import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from tests.benchmarks.beside.common import TEXTS, Reader, padded


class Next(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Reader()

    def predict_step(self, batch, index):
        places, text = batch
        return places, self.model(text)[:, :, 0].argmax(1)


def numbered(samples):
    places, texts = zip(*samples, strict=True)
    return torch.tensor(places), padded(texts)


loader = DataLoader(list(enumerate(TEXTS)), batch_size=4, collate_fn=numbered)
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
trainer = Trainer(**options)
places, found = (torch.cat(parts) for parts in zip(*trainer.predict(Next(), loader), strict=True))
everyone = [(places, found)]
if trainer.world_size > 1:
    everyone = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, (places, found))
result = torch.empty(len(TEXTS), dtype=torch.int64)
for places, found in everyone:
    result[places] = found
