"""Several optimizers that step together, as one optimizer of torch."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from strategies.errors import UserError


class Optimizers(Optimizer):
    """Several optimizers that step together, as one: `Optimizers(Muon(matrices), AdamW(rest))`.

    Its `param_groups` are the same dictionaries as theirs, and all share one `state`. So an LR scheduler, a checkpoint
    or a hook works as with a single optimizer. Each may also have an LR scheduler of its own. Raises UserError for a
    closure, and for `add_param_group`: call that on one of the optimizers.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers: list[Optimizer] = []
        super().__init__([{"params": []}], {})
        self.optimizers += [part for optimizer in optimizers for part in parts_of(optimizer)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, read from them: torch puts new groups in place when it loads a state."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        rest = iter(groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(rest) for _ in optimizer.param_groups]

    @property
    def state(self) -> defaultdict[Any, Any]:
        """The state that all share. The state of an optimizer that was loaded by itself is merged into it."""
        for optimizer in self.optimizers:
            if optimizer.state is not self._state:
                self._state.update(optimizer.state)
                optimizer.state = self._state
        return self._state

    @state.setter
    def state(self, state: defaultdict[Any, Any]) -> None:
        self._state = state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a loaded state: each optimizer takes its groups, and completes those of an older version of itself."""
        self.param_groups, self._state = state["param_groups"], state["state"]
        for optimizer in self.optimizers:
            optimizer.__setstate__({"param_groups": optimizer.param_groups, "state": self._state})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise UserError("closure: expected None, since several optimizers step once, after the window's backward.")
        for optimizer in self.optimizers:
            optimizer.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise UserError: the group would be of no optimizer."""
        if self.optimizers:
            raise UserError("add_param_group: expected a single optimizer. Call it on the one that steps the group.")


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that step together as `optimizer`: itself, if it is a single one."""
    return optimizer.optimizers if isinstance(optimizer, Optimizers) else [optimizer]


def with_modes(optimizer: Optimizer) -> list[Any]:
    """Return the optimizers that have `train()` and `eval()`: schedule-free ones, which evaluate other parameters."""
    return [part for part in parts_of(optimizer) if hasattr(part, "train") and hasattr(part, "eval")]
