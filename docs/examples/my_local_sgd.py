"""Local SGD: the engine calls `clear_gradients` after each update, on all processes alike.

The engine compares the norm between replicas, so `clip` returns one over all processes.
"""

import torch

from strategies import DDPStrategy


class LocalSGD(DDPStrategy):
    """Averages parameters after every `every`-th update, and reduces no gradient."""

    name = "local-sgd"
    exact_to = None
    resumes_exactly = False

    def __init__(self, every: int = 4, timeout_seconds: float = 300.0) -> None:
        super().__init__(timeout_seconds=timeout_seconds)
        self.every = every

    def prepare(self, model):
        prepared = super().prepare(model)
        self._updates = 0
        return prepared

    def accumulation_context(self, is_last_microbatch: bool):
        return self._ddp.no_sync()

    def join(self, window) -> None:
        """Nothing waits for this process."""

    def clip(self, max_norm, factor=1.0):
        norm = super().clip(max_norm, factor).double()  # float32 where this process has no gradient
        return self.all_reduce(norm**2).sqrt()

    @torch.no_grad()
    def clear_gradients(self) -> None:
        super().clear_gradients()
        self._updates = getattr(self, "_updates", 0) + 1
        if self._updates % self.every == 0:
            for parameter in self._parameters:
                self.all_reduce(parameter).div_(self.data_parallel_size)

    def fingerprint(self) -> int:
        return 0

    def reductions(self) -> tuple[int, int]:
        return 0, 0
