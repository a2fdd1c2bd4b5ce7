"""Checks of a task's model, optimizer and gradients."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from engine.errors import UserError


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


def check_optimizer(configured: object, model: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
    """Return the optimizer and the LR scheduler, if any, that a task configured.

    Raises UserError for anything else, for one that needs more than `step()`, and for parameters that no strategy
    would reduce.
    """
    optimizer: object
    lr_scheduler: object
    is_pair = isinstance(configured, tuple) and len(configured) == 2
    optimizer, lr_scheduler = configured if is_pair else (configured, None)  # type: ignore[misc]
    if not isinstance(optimizer, Optimizer) or not isinstance(lr_scheduler, LRScheduler | None):
        raise UserError(
            f"configure_optimizer() returned {configured!r}: expected an optimizer, or an optimizer and an LR "
            "scheduler."
        )
    for unsupported in (optimizer, lr_scheduler):
        if isinstance(unsupported, LBFGS | ReduceLROnPlateau):
            instead = "the callback PlateauLR" if isinstance(unsupported, ReduceLROnPlateau) else "another optimizer"
            raise UserError(f"{type(unsupported).__name__} needs more than step() once per update. Use {instead}.")
    closure = signature(optimizer.step).parameters.get("closure")
    if hasattr(optimizer, "first_step") or (closure is not None and closure.default is closure.empty):
        raise UserError(
            f"{type(optimizer).__name__} needs a closure, and so several passes for one update: expected an optimizer "
            "whose step() takes none. Use another optimizer."
        )
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise UserError(
            "the optimizer holds a parameter that is not the model's: it would not be reduced over the processes. "
            "Make it part of the module that configure_model() returns."
        )
    return optimizer, lr_scheduler


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
