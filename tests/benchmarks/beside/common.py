"""What both programs of a pair are given: texts of unequal length, their collating, and a small model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

PADDING = -100
TEXTS = [torch.arange(start, start + 2 + start % 7) % 10 for start in range(37)]
TOKENS = [{"input_ids": text.tolist()} for text in TEXTS]


class Reader(nn.Module):
    """Scores for each next token of a text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.scores = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.double()

    def forward(self, text: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.embed(text.clamp(min=0)).tanh())
        return scores.transpose(1, 2)


def padded(texts: list[Tensor]) -> Tensor:
    return pad_sequence(texts, batch_first=True, padding_value=PADDING)
