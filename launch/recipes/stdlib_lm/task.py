"""A small causal transformer over bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset

from engine import Loss, Task
from engine.order import bucketed, within_budget
from launch.recipes.stdlib_lm.functions import train_and_held_out

BYTES, START, PADDING = 256, 256, -100


class StdlibLM(Task):
    """Predict each byte of a function from those before it. A sample is one function, a micro-batch is padded.

    A loss is a sum over bytes, and its weight is their number, so padding counts nothing.

    `functions` limits how many are used (None: all), `max_bytes` cuts long ones. `batches` says how an
    epoch is ordered: "shuffled", "bucketed" (neighbours of similar length, less padding), or "budget" (each micro-batch
    holds at most `budget` bytes with its padding; use `micro_batch_size=1`).
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        max_bytes: int = 512,
        functions: int | None = None,
        lr: float = 3e-3,
        warmup: float = 0.05,
        batches: Literal["shuffled", "bucketed", "budget"] = "bucketed",
        bucket: int = 256,
        budget: int = 8192,
    ) -> None:
        self.width, self.layers, self.heads = width, layers, heads
        self.max_bytes, self.functions = max_bytes, functions
        self.lr, self.warmup = lr, warmup
        self.batches, self.bucket, self.budget = batches, bucket, budget

    def configure_model(self) -> nn.Module:
        """Return the transformer: bytes (batch, length) -> scores (batch, length, 256)."""
        return ByteTransformer(self.width, self.layers, self.heads, self.max_bytes)

    def configure_optimizer(self, model: nn.Module) -> tuple[Optimizer, LRScheduler]:
        """Return AdamW with a warm-up and a cosine over exactly the updates to come."""
        optimizer = AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.98), weight_decay=0.1)
        total = self.total_updates or 1
        warmup = max(1, round(self.warmup * total))

        def factor(update: int) -> float:
            if update < warmup:
                return (update + 1) / warmup
            return 0.05 + 0.475 * (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup)))

        return optimizer, LambdaLR(optimizer, factor)

    def train_data(self) -> Dataset[Tensor]:
        """Return nine tenths of the functions."""
        data = Functions(train_and_held_out(self.functions)[0], self.max_bytes)
        lengths = [len(data[i]) for i in range(len(data))]
        if self.batches == "bucketed":
            self._order = bucketed(lengths, self.bucket, seed=0)
        elif self.batches == "budget":
            self._order = within_budget(lengths, self.budget, seed=0)
        return data

    def validation_data(self) -> Dataset[Tensor]:
        """Return the other tenth."""
        return Functions(train_and_held_out(self.functions)[1], self.max_bytes)

    def order(self, epoch: int) -> Any:
        """Return the order that `batches` names."""
        return None if self.batches == "shuffled" else self._order(epoch)

    def collate(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, padded to the longest: (batch, length) each."""
        targets = pad_sequence(list(samples), batch_first=True, padding_value=PADDING)
        start = targets.new_full((len(targets), 1), START)
        return torch.cat([start, targets[:, :-1].clamp(min=0)], dim=1), targets

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """Return the summed cross-entropy in nats, and the bytes that it is over."""
        inputs, targets = batch
        scores = model(inputs).float()
        total = cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum")
        return Loss(total, (targets != PADDING).sum())

    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Loss]:
        """Return nats per byte."""
        return {"nats_per_byte": self.loss(model, batch)}


class Functions(Dataset[Tensor]):
    """Functions as tensors of bytes, cut to `max_bytes`."""

    def __init__(self, functions: Sequence[bytes], max_bytes: int) -> None:
        self._functions = functions
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        return len(self._functions)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(list(self._functions[index][: self._max_bytes]))


class ByteTransformer(nn.Module):
    """Embeddings of bytes and positions, pre-norm layers that look back only, scores for the next byte."""

    def __init__(self, width: int, layers: int, heads: int, max_bytes: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES + 1, width)
        self.positions = nn.Embedding(max_bytes, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.scores = nn.Linear(width, BYTES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (batch, length, 256) for inputs (batch, length)."""
        length = inputs.shape[1]
        x = self.bytes(inputs) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=inputs.device, dtype=x.dtype)
        scores: Tensor = self.scores(self.layers(x, mask=mask, is_causal=True))
        return scores
