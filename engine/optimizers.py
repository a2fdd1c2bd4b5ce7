"""A task's optimizers: their parameters, names in records, LR schedulers and modes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.errors import UserError, listed
from strategies import parts_of, user_name, with_modes

Rule = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


def parameter_groups(model: nn.Module, /, **rules: Rule) -> list[dict[str, Any]]:
    """Return a parameter group, {"name": ..., "params": [...]}, for each rule; give it to any optimizer, in a list.

    A rule is a pattern of names such as "*.bias", a list of these, or a function of name and parameter; the first that
    matches counts, for frozen ones too. The name is that of the learning rate in records. Raises UserError for a
    trainable parameter that no rule matches, and for a rule without a parameter.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rules}
    unmatched = []
    for name, parameter in ((user_name(full), parameter) for full, parameter in model.named_parameters()):
        group = next((group for group, rule in rules.items() if _matches(rule, name, parameter)), None)
        if group is not None:
            groups[group].append(parameter)
        elif parameter.requires_grad:
            unmatched.append(name)
    if unmatched:
        raise UserError(
            f"no rule of {', '.join(rules) or 'none'} matches these parameters:{listed(unmatched)}\nAdd rest='*' as "
            "the last rule, or freeze them with requires_grad_(False)."
        )
    if empty := [f"{name}={rules[name]!r}" for name, parameters in groups.items() if not parameters]:
        raise UserError(
            f"these rules match no parameter that an earlier rule has left:{listed(empty)}\nExpected one at least. "
            "Leave the rule out, or put it first."
        )
    return [{"name": name, "params": parameters} for name, parameters in groups.items()]


def _matches(rule: Rule, name: str, parameter: nn.Parameter) -> bool:
    if callable(rule):
        return rule(name, parameter)
    return any(fnmatchcase(name, pattern) for pattern in ([rule] if isinstance(rule, str) else rule))


def group_names(optimizer: Optimizer) -> list[str]:
    """Return a name of each parameter group: its own, else the class of its optimizer, with its index if not unique."""
    names = [str(g.get("name", type(part).__name__)) for part in parts_of(optimizer) for g in part.param_groups]
    return [name if names.count(name) == 1 else f"{name}.{index}" for index, name in enumerate(names)]


class LRSchedulers(LRScheduler):
    """The LR schedulers of several optimizers, moved together once per update."""

    def __init__(self, *schedulers: LRScheduler) -> None:
        self.schedulers = schedulers

    def step(self, epoch: int | None = None) -> None:
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"schedulers": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler, state in zip(self.schedulers, state_dict["schedulers"], strict=True):
            scheduler.load_state_dict(state)


@contextmanager
def evaluated(optimizer: Optimizer) -> Iterator[None]:
    """Give the model the parameters that schedule-free optimizers evaluate; on exit the trained ones, to the bit."""
    parts = with_modes(optimizer)
    held = [p.detach() for part in parts for group in part.param_groups for p in group["params"]]
    kept = [p.clone() for p in held]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for part in parts:
            part.train()
        for parameter, values in zip(held, kept, strict=True):
            parameter.copy_(values)
