"""Checks of a task's model, optimizer and gradients."""

from collections.abc import Iterable
from inspect import signature
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from engine.errors import UserError, listed
from engine.optimizers import LRSchedulers
from strategies import Optimizers, parts_of, user_name


def check_model(model: object) -> None:
    """Raise UserError for a model that cannot be trained: not a module, nothing to train, sparse gradients."""
    if not isinstance(model, nn.Module):
        raise UserError(f"configure_model() returned {type(model).__name__}: expected a torch.nn.Module.")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise UserError("the model has lazy parameters. Run it once on a batch in configure_model().")
    if meta := [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise UserError(
            f"{meta[0]} is on the meta device, without values: expected a model on the CPU. Use to_empty(device='cpu') "
            "and initialise it in configure_model()."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("the model has no parameter that requires grad: there is nothing to train.")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            where = f"module {name!r}" if name else "the model"
            raise UserError(f"{where} has sparse gradients, which are not supported. Use sparse=False.")


def count_batch_norms(model: nn.Module) -> int:
    """Return the number of layers that normalise over a micro-batch, which accumulation cannot make larger."""
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def draws(model: nn.Module) -> bool:
    """Whether the model has dropout; what else draws cannot be told."""
    return any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules())


def check_optimizer(configured: Any, model: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
    """Return the optimizer and LR scheduler, if any, that a task configured; several are put together as one.

    Raises UserError for unsupported ones, and unless they share out the model's trainable parameters.
    """
    is_one = isinstance(configured, Optimizer) or (
        isinstance(configured, tuple) and len(configured) == 2 and not isinstance(configured[1], Optimizer)
    )
    pairs: list[Any] = [configured] if is_one or not isinstance(configured, list | tuple) else list(configured)
    pairs = [pair if isinstance(pair, tuple) and len(pair) == 2 else (pair, None) for pair in pairs]
    for optimizer, lr_scheduler in pairs:
        if not isinstance(optimizer, Optimizer) or not isinstance(lr_scheduler, LRScheduler | None):
            raise UserError(
                f"configure_optimizer() returned {configured!r}: expected an optimizer, an optimizer and an LR "
                "scheduler, or a list of these."
            )
        for unsupported in (*parts_of(optimizer), lr_scheduler):
            _check_steps(unsupported)
    if not pairs:
        raise UserError("configure_optimizer() returned no optimizer: expected at least one.")
    optimizer = pairs[0][0] if len(pairs) == 1 else Optimizers(*(optimizer for optimizer, _ in pairs))
    schedulers = [lr_scheduler for _, lr_scheduler in pairs if lr_scheduler is not None]
    _check_shares(optimizer, model)
    return optimizer, LRSchedulers(*schedulers) if len(schedulers) > 1 else next(iter(schedulers), None)


def _check_steps(unsupported: Optimizer | LRScheduler | None) -> None:
    """Raise UserError for an optimizer or LR scheduler that needs more than `step()`."""
    if isinstance(unsupported, ReduceLROnPlateau):
        raise UserError("ReduceLROnPlateau needs a metric for its step(). Use the callback PlateauLR.")
    closure = signature(unsupported.step).parameters.get("closure") if isinstance(unsupported, Optimizer) else None
    takes_closure = closure is not None and closure.default is closure.empty
    if isinstance(unsupported, LBFGS) or hasattr(unsupported, "first_step") or takes_closure:
        raise UserError(
            f"{type(unsupported).__name__} needs a closure, and so several passes for one update: expected an "
            "optimizer whose step() takes none. Use one such as AdamW, or write the loop in plain torch."
        )


def _check_shares(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise UserError for a parameter of another model, and unless several optimizers share out the trainable ones."""
    names = {p: user_name(name) for name, p in model.named_parameters()}
    parts = parts_of(optimizer)
    owners: dict[nn.Parameter, list[str]] = {p: [] for p in names}
    for part in parts:
        for parameter in (p for group in part.param_groups for p in group["params"]):
            if parameter not in owners:
                raise UserError(
                    "the optimizer holds a parameter that is not the model's: it would not be reduced over the "
                    "processes. Make it part of the module that configure_model() returns."
                )
            owners[parameter].append(type(part).__name__)
    wrong = {names[p]: o for p, o in owners.items() if len(o) > 1 or (p.requires_grad and not o)}
    if len(parts) > 1 and wrong:
        problems = [f"{name}: {' and '.join(o) or 'none'}" for name, o in wrong.items()]
        raise UserError(
            f"several optimizers: expected each trainable parameter in exactly one. These are in:{listed(problems)}\n"
            "Use engine.parameter_groups, or freeze what is not to learn."
        )


def check_parameters(model: nn.Module, optimizer: Optimizer, at_start: Iterable[nn.Parameter]) -> None:
    """Raise UserError if the model or the optimizer has other parameters than the model had `at_start`."""
    known, now = set(at_start), {parameter: name for name, parameter in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in dict.fromkeys([*now, *held]) if p not in known]
    if new or len(now) < len(known):
        what = f"{now.get(new[0], 'one of the optimizer')!r} is new" if new else f"{len(known) - len(now)} are missing"
        raise UserError(
            f"the parameters changed during training ({what}): expected those of the start, since others are not "
            "reduced, cleared or saved. Build the whole model in configure_model(), give the optimizer all of it, and "
            "freeze with requires_grad_(False) what is trained later."
        )


def check_no_gradients(model: nn.Module) -> None:
    """Raise UserError if a parameter has a gradient before a window's first forward: it would enter the update."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and getattr(gradient, "_local_tensor", gradient).any():  # zero: a view of DDP's buckets
            raise UserError(
                f"parameter {name!r} has a gradient before the window's first backward: expected none. If another "
                "model learns through this one, freeze this one meanwhile, with model.requires_grad_(False)."
            )


def check_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise UserError for a sparse gradient that no module announced; called at the first update."""
    for name, parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise UserError(f"parameter {name!r} has a sparse gradient, which is not supported. Use sparse=False.")
