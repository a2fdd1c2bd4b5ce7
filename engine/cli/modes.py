"""Modes instead of training: `--plan` prints what the run would do, `--check` tries one window."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from engine.callbacks import Callback
from engine.callbacks.banner import banner
from engine.errors import UserError, check_count
from engine.records.metric import MetricRule
from engine.trainer import Trainer


def options() -> ArgumentParser:
    """Return the options that choose a mode; the rest are the run's own."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true", help="Print what the run would do, and end")
    parser.add_argument("--plan.processes", type=int, metavar="P", help="Plan for P processes")
    parser.add_argument("--check", action="store_true", help="Build everything, run one window, write nothing, and end")
    parser.add_argument("-h", "--help", action="store_true", help="Print options; --task.help=CLASS: those of a task")
    return parser


def split(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the mode and the arguments that are left for the run. Raises ArgumentError or ValueError."""
    modes, rest = options().parse_known_args(arguments)
    P = getattr(modes, "plan.processes")
    modes.plan = modes.plan or P is not None
    if modes.plan and modes.check:
        raise UserError("--plan and --check: expected one of them, not both.")
    if P is not None:
        check_count("plan.processes", P)
    return modes, rest


class OneWindow(Callback):
    """Ends the run after its first window, and tells how that went, on process 0. `keep_best` needs its metric."""

    def __init__(self, keep_best: str | None = None) -> None:
        self._has_run, self._rule = False, MetricRule("keep_best", keep_best) if keep_best else None

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.strategy.rank == 0:
            print(banner(trainer), flush=True)
        if trainer.strategy.data_parallel_size > 1:
            trainer.stop()  # they agree on it in the window itself

    def on_update_end(self, trainer: Trainer) -> None:
        self._has_run = True
        trainer.stop()

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._rule is not None and self._has_run:
            self._rule.value(trainer.metrics)
        if trainer.strategy.rank == 0:
            print(self._report(trainer), flush=True)

    def _report(self, trainer: Trainer) -> str:
        if not self._has_run:
            return "checked: everything was built. The run is finished, so no window was left."
        record, P = trainer.record, trainer.strategy.data_parallel_size
        processes = "1 process" if P == 1 else f"{P} processes"
        text = (
            f"checked: one window of {record['effective_batch']:,} samples on {processes}: loss {record['loss']:.4f}, "
            f"gradient norm {record['grad_norm']:.3g}"
        )
        if record["skipped"]:
            text += ", and its update was skipped"
        if "window_bytes" in record:
            text += f"; its outputs are {record['window_bytes']:,.0f} bytes on each process"
        if trainer.metrics:
            means = (f"{name} {value:.4g}" for name, value in trainer.metrics.items())
            text += ", ".join(["; validated on a few samples", *means])
        return f"{text}. Nothing was written."
