"""The banner: what a run will do, printed before it starts."""

from engine.callbacks.base import Trainer
from engine.data.checks import can_redo
from engine.disk import shown
from engine.update.model_checks import count_batch_norms, draws

INDENT = 12


def banner(trainer: Trainer) -> str:
    """Return the lines that are printed on process 0 before a run."""
    model, strategy, settings = trainer.model, trainer.strategy, trainer.settings
    trainable = [p for p in model.parameters() if p.requires_grad]
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trainable}))
    count = sum(p.numel() for p in trainable)
    frozen = sum(p.numel() for p in model.parameters()) - count
    lines = {
        "task": f"{type(trainer.task).__module__}.{type(trainer.task).__qualname__}",
        "model": f"{type(model).__name__}, {count:,} parameters" + (f" and {frozen:,} frozen" if frozen else ""),
        "strategy": strategy.describe(),
        "precision": dtypes + (f", autocast to {settings.precision}" if settings.precision else ""),
        "window": _windows(trainer),
        "tried": ("\n" + " " * INDENT).join(map(str, trainer.tried)),
        "lr rule": _lr_rule(trainer),
        "updates": _updates(trainer),
        "run folder": shown(trainer.run_folder.path) if trainer.run_folder is not None else "none (nothing is written)",
    }
    if normalises := count_batch_norms(model):
        where = "of all processes at a time" if strategy.needs_equal_windows else "on one process"
        lines["batch norm"] = f"{normalises} layers normalise over a micro-batch {where}, not over the window"
    changing = [*(["BatchNorm"] if normalises else []), *(["dropout"] if draws(model) else [])]
    if changing and can_redo(strategy):
        lines["memory"] = f"if it runs out, N is halved, which changes {' and '.join(changing)}"
    if not model.training:
        lines["mode"] = "eval, as configure_model() left it: dropout is off (call model.train() there)"
    return "\n".join(f"{name + ':':<{INDENT}}{text}" for name, text in lines.items() if text)


def _windows(trainer: Trainer) -> str:
    P, N, schedule = trainer.strategy.data_parallel_size, trainer.micro_batch_size, trainer.schedule
    lines = []
    for stage in schedule.stages:
        since = f"from {schedule.unit} {stage.first}: " if len(schedule.stages) > 1 else ""
        K, B = stage.accumulate_grad_batches, stage.effective_batch
        lines.append(f"{since}P {P} x N {N} x K {K} = effective batch {B}")
    return ("\n" + " " * INDENT).join(lines)


def _lr_rule(trainer: Trainer) -> str:
    rule, reference, schedule = trainer.settings.lr_rule, trainer.settings.lr_reference_batch, trainer.schedule
    if rule == "none":
        return ""
    parts = (
        f"x {stage.lr_factor:.4g}" + (f" from {schedule.unit} {stage.first}" if len(schedule.stages) > 1 else "")
        for stage in schedule.stages
    )
    return f"{rule}, learning rates are for an effective batch of {reference}: {', '.join(parts)}"


def _updates(trainer: Trainer) -> str:
    if trainer.plan is None:
        return "until the stream ends" if trainer.total_updates is None else f"{trainer.total_updates:,}"
    total, schedule = trainer.plan.updates, trainer.schedule
    if schedule.unit != "epoch":
        return f"{total:,}"
    per_epoch = ", ".join(f"{trainer.plan.updates_in_epoch(stage.first):,}" for stage in schedule.stages)
    return f"{total:,} ({per_epoch} per epoch of {trainer.plan.samples:,} samples)"
