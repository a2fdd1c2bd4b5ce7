import json
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tests.benchmarks.beside.common import PADDING, TEXTS, Reader, padded

accelerator = Accelerator(gradient_accumulation_steps=1, cpu=True)
K = 16 // (4 * accelerator.num_processes)
draw = torch.Generator()
loader = DataLoader(TEXTS, batch_size=4, shuffle=True, generator=draw, collate_fn=padded)
model = Reader()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
place = {"epoch": 0, "batches": 0, "update": 0}
folder = Path("own")
if folder.exists():
    accelerator.load_state(folder)
    scheduler.load_state_dict(torch.load(folder / "schedule.pt", weights_only=True))
    place = json.loads((folder / "place.json").read_text())
for epoch in range(place["epoch"], 3):
    draw.manual_seed(epoch)
    loader.set_epoch(epoch)
    batches = iter(accelerator.skip_first_batches(loader, place["batches"]))
    while place["update"] < 8 and (window := [*islice(batches, K)]):
        tokens = accelerator.gather(sum((text[:, 1:] != PADDING).sum() for text in window)).sum()
        for number, text in enumerate(window, 1):
            with accelerator.no_sync(model) if number < len(window) else torch.enable_grad():
                total = cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="sum")
                accelerator.backward(total * accelerator.num_processes / tokens)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        place = {"epoch": epoch, "batches": place["batches"] + len(window), "update": place["update"] + 1}
        accelerator.save_state(folder)
        if accelerator.is_main_process:
            torch.save(scheduler.state_dict(), folder / "schedule.pt")
            (folder / "place.json").write_text(json.dumps(place))
    place["batches"] = 0
result = accelerator.unwrap_model(model).scores.weight.detach()
