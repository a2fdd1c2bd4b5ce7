"""The forward of a process without a micro-batch: it reads no data, and its gradients are zero."""

from torch import Tensor, nn


class EmptyForward(nn.Module):
    """A forward without data: it returns zero, with gradient zero for `parameters`."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._held = tuple(parameters)  # not registered: they belong to the model

    def forward(self) -> Tensor:
        """Return 0, as a function of the parameters: the sum of none of their rows, whose gradient is finite.

        `p.sum() * 0` would be NaN for a parameter that is not finite.
        """
        total = self._held[0].new_zeros(())
        for parameter in self._held:
            total = total + parameter.unsqueeze(0)[:0].sum()
        return total
