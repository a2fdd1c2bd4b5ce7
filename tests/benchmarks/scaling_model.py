"""A small model of how fast updates are made, calibrated from one run: what would another K or P give?

    seconds of an update = K x micro-batch + max(0, ring(P) - overlap) + step

The ring's slowest link bounds it: 2 (P - 1) / P x bytes / bandwidth + 2 (P - 1) x latency per collective. A micro-batch
is taken to cost the same at any P (a processor for each process), and waiting for slower ones what it cost in that run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.errors import UserError


class Link(NamedTuple):
    """The slowest link that a ring of processes goes over."""

    bandwidth: float
    """Bytes a second."""
    latency: float
    """Seconds of one message."""

    def ring(self, P: int, collectives: int, size: int) -> float:
        """Return the seconds of `collectives` ring all-reduces over `size` bytes together, one after the other."""
        return 2 * (P - 1) / P * size / self.bandwidth + 2 * (P - 1) * self.latency * collectives


class Scaling(NamedTuple):
    """What an update is made of."""

    link: Link
    collectives: int
    size: int
    """Bytes reduced per update."""
    micro_batch: float
    step: float
    overlap: float
    """Seconds of the reduction that the last backward hides; negative: of waiting that the ring does not explain."""

    def seconds(self, P: int, K: int) -> float:
        """Return the seconds of an update."""
        ring = self.link.ring(P, self.collectives, self.size)
        exposed = max(0.0, ring - self.overlap) if P > 1 else 0.0
        return K * self.micro_batch + exposed + self.step


def calibrated(summary: dict[str, Any], link: Link) -> Scaling:
    """Return the model of the run of P >= 2 that wrote `summary` (summary.json).

    Raises UserError where the run did not measure its reduction.
    """
    measured = summary["reduction"]
    if measured is None:
        raise UserError("the run does not know what its reduction costs: calibrate with K >= 2, on several processes.")
    collectives, size = summary["all_reduces_per_update"], summary["bytes_reduced_per_update"]
    overlap = link.ring(summary["processes"], collectives, size) - measured["seconds"]
    micro_batch, step = measured["seconds_per_micro_batch"], measured["seconds_of_step"]
    return Scaling(link, collectives, size, micro_batch, step, overlap)
