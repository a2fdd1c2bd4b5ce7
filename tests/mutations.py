"""Break the engine on purpose, one fault at a time, and see a test go red for each.

    python tests/mutations.py              # all of them, two at a time, in copies: the code stays as it is
    python tests/mutations.py clip stream  # those whose name has one of these words

Prints the table of docs/testing.md. Fails if a fault survives, or no longer applies because its line has changed.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import processes  # noqa: F401 - torch, imported once: not by each pytest
import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("engine", "strategies", "launch", "tests", "pyproject.toml")
WORKERS = int(os.environ.get("TEST_WORKERS", "2"))
FORK = multiprocessing.get_context("fork")


class Mutation(NamedTuple):
    """A fault: `old`, which stands once in `file`, becomes `new`, and one of `tests` must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: str


TABLE = "tests/test_table.py::test_ddp_equals_one_big_batch"
TOKENS = "tests/test_tokens.py::test_tokens_weigh_alike_wherever_they_are"
STREAMS = "tests/test_streams.py::test_uneven_streams_equal_one_big_batch"
PREVIEW = "tests/test_preview.py::test_the_plan_is_what_the_run_does"
COUNTS = "tests/test_collectives.py::test_one_all_reduce_per_bucket_and_one_message_per_update"
LAYOUT = "tests/test_layout.py::test_every_layout_sees_the_same_samples_at_every_update_and_ends_alike"
DRAWS = "tests/test_layout.py::test_every_sample_and_micro_batch_of_every_epoch_draws_anew"

KILLED = "'tests/test_resume.py::test_killed_twice_and_continued_is_uninterrupted_to_the_bit[3-boundary]'"

LOOP, DDP, BASE, PLAN = (
    "engine/update/updater.py",
    "strategies/ddp/strategy.py",
    "strategies/base.py",
    "engine/plan/windows.py",
)
FSDP = "strategies/fsdp/strategy.py"

MUTATIONS = [
    # the arithmetic of an update
    Mutation(
        "divide by the nominal window",
        LOOP,
        "correction = self._unit / facts.weight if",
        "correction = self._unit / window.stage.effective_batch if",
        TABLE,
    ),
    Mutation("divide by P twice", DDP, "scale * self.data_parallel_size)", "scale)", TABLE),
    Mutation(
        "average the averages of ragged micro-batches",
        "engine/update/loss_sum.py",
        "= loss, micro.size",
        "= loss, 1",
        TABLE,
    ),
    Mutation(
        "divide by this process's weight",
        LOOP,
        "self._unit / facts.weight",
        "self._unit / float(self.sums._weight)",
        TOKENS,
    ),
    Mutation(
        "divide by the weight of the update before",
        LOOP,
        "correction = self._unit / facts.weight if facts.weight else 1.0",
        "correction = 1.0",
        TOKENS,
    ),
    Mutation(
        "a unit that processes do not share",
        LOOP,
        "facts.weight if facts.weight !=",
        "self.sums.samples if facts.weight !=",
        TOKENS,
    ),
    Mutation(
        "apply the scale twice",
        LOOP,
        "self._loss_scale.value / self._unit",
        "self._loss_scale.value / self._unit**2",
        TABLE,
    ),
    Mutation(
        "leave fp16's scale in the gradient",
        LOOP,
        "correction / self._loss_scale.value",
        "correction",
        "tests/test_precision.py",
    ),
    Mutation(
        "step on a window of weight 0",
        LOOP,
        "skipped = overflowed or facts.weight == 0",
        "skipped = overflowed",
        "tests/test_tokens.py::test_a_window_of_weight_zero_is_a_skipped_update",
    ),
    Mutation(
        "step on a gradient that is not finite",
        LOOP,
        "overflowed = self._skips_nonfinite and",
        "overflowed = False and",
        "tests/test_loop.py::test_an_update_that_is_not_finite_is_skipped_on_all_processes",
    ),
    Mutation(
        "clip each micro-batch",
        BASE,
        "                self.backward(loss, scale)\n",
        "                self.backward(loss, scale)\n                self.clip(0.05)\n",
        "tests/test_table.py::test_clipping_acts_on_the_whole_gradient_of_an_update",
    ),
    Mutation(
        "clip before the correction",
        BASE,
        "            norm = norm * factor\n",
        "            pass\n",
        "tests/test_strategies.py::test_clip_is_that_of_torch_after_the_factor",
    ),
    Mutation(
        "gradients leak into the next window",
        LOOP,
        "        self.strategy.clear_gradients()\n        if facts.weight",
        "        self.optimizer.zero_grad()\n        if facts.weight",
        "tests/test_loop.py::test_gradients_that_no_optimizer_holds_do_not_leak_into_the_next_window",
    ),
    Mutation(
        "move the learning rate with each micro-batch",
        LOOP,
        "weighed = add(compute(model, micro.batch), micro)",
        "weighed = add(compute(model, micro.batch), micro); self.lr_scheduler and self.lr_scheduler.step()",
        "tests/test_loop.py::test_the_learning_rate_moves_once_per_update",
    ),
    Mutation(
        "report this process's loss",
        LOOP,
        "mean = facts.loss / facts.weight",
        "mean = self.sums.read()[1] / facts.weight",
        "tests/test_loop.py::test_the_loss_of_a_record_is_the_mean_over_its_window",
    ),
    # windows and data
    Mutation("the boundary one micro-batch late", PLAN, "piece + P >= pieces", "piece + P > pieces", COUNTS),
    Mutation("the boundary one micro-batch early", PLAN, "piece + P >= pieces", "piece + 2 * P >= pieces", COUNTS),
    Mutation(
        "drop the tail",
        PLAN,
        "            yield Window(offset, stop, stage)",
        "            if stop - offset == stage.effective_batch:\n                yield Window(offset, stop, stage)",
        TABLE,
    ),
    Mutation(
        "cut micro-batches by P",
        PLAN,
        "piece * N, min((piece + 1) * N,",
        "piece * N, min((piece + 1) * N + P - 1,",
        TABLE,
    ),
    Mutation(
        "spread a window unevenly",
        PLAN,
        "min(self.samples, -(-pieces // P) * P) if spread else pieces",
        "pieces",
        "tests/test_plan.py",
    ),
    Mutation(
        "count one update too few",
        PLAN,
        "end - stage.first) * -(-self.samples",
        "end - stage.first - 1) * -(-self.samples",
        "tests/test_plan.py",
    ),
    Mutation(
        "plan nominal windows",
        "engine/preview/forecast.py",
        "before[window.stop] - before[window.start], window",
        "window.stage.effective_batch, window",
        PREVIEW,
    ),
    Mutation(
        "plan the learning rate one update late",
        "engine/preview/forecast.py",
        "lrs[number] *",
        "lrs[number - 1] *",
        PREVIEW,
    ),
    Mutation(
        "plan the bytes of float32",
        "strategies/ddp/strategy.py",
        "p.numel() * p.element_size()",
        "p.numel() * 4",
        PREVIEW,
    ),
    Mutation(
        "change K one epoch late",
        "engine/plan/schedule.py",
        "return bisect_right(self.stages, place,",
        "return bisect_right(self.stages, place - 1,",
        "tests/test_plan.py",
    ),
    Mutation("the same order in every epoch", "engine/order.py", "PCG64([seed, epoch])", "PCG64([seed])", LAYOUT),
    Mutation(
        "seed the dataset without the epoch",
        "engine/data/fetch.py",
        "FETCH_STREAM, epoch, place",
        "FETCH_STREAM, place",
        DRAWS,
    ),
    Mutation("seed the model without the epoch", "engine/seeds.py", "MODEL_STREAM, epoch)", "MODEL_STREAM)", DRAWS),
    Mutation(
        "seed the model by process",
        "engine/update/updater.py",
        "            seed(key + micro.place",
        "            seed(self.strategy.rank + key + micro.place",
        "tests/test_layout.py::test_dropout_and_augmentation_do_not_know_P",
    ),
    Mutation(
        "a stream that ends within a window has no last micro-batch",
        "engine/data/stream.py",
        "place == last or not more",
        "place == last",
        STREAMS,
    ),
    Mutation(
        "a process's own end ends the epoch",
        LOOP,
        "window.more, window.samples = facts.more > 0, int(facts.samples)",
        "window.samples = int(facts.samples)",
        STREAMS,
    ),
    Mutation(
        "count padded validation samples twice",
        "engine/training/validation.py",
        "means[name] = total / weight if",
        "means[name] = sum(r[name][0] / r[name][1] for r in everyone if name in r) / len(everyone) if",
        "tests/test_loop.py::test_a_validation_mean_is_that_over_all_samples_once",
    ),
    # processes
    Mutation(
        "reduce every micro-batch",
        DDP,
        "NOTHING_TO_DEFER if is_last_microbatch else self._ddp.no_sync()",
        "NOTHING_TO_DEFER",
        COUNTS,
    ),
    Mutation(
        "the context around backward only",
        BASE,
        "            with self.accumulation_context(micro.is_last):\n                loss, scale = forward(micro)\n",
        "            loss, scale = forward(micro)\n            with self.accumulation_context(micro.is_last):\n",
        COUNTS,
    ),
    Mutation(
        "skip the pass of a process without data",
        DDP,
        "            super().backward(self._ddp(), 1.0)",
        "            pass",
        "'tests/test_streams.py::test_uneven_streams_equal_one_big_batch[[0, 1]-even]'",
    ),
    Mutation(
        "let DDP reorder its buckets in the second window",
        DDP,
        "        self._fix_buckets()\n",
        "",
        "tests/test_strategies.py::test_a_rerun_sums_in_the_same_order_to_the_bit",
    ),
    Mutation(
        "believe that every gradient was reduced",
        DDP,
        "            self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]",
        "            pass",
        "tests/test_strategies.py::test_a_gradient_that_was_not_reduced_is_an_error_that_names_it",
    ),
    Mutation(
        "do not compare replicas",
        "engine/training/session.py",
        "        trainer.loop.check_replicas(trainer.update)\n",
        "",
        "tests/test_replicas.py::test_replicas_that_diverge_stop_the_run_on_all_processes",
    ),
    Mutation(
        "buffers in each forward",
        DDP,
        "            **_buffers_are_ours(),\n",
        "",
        "tests/test_replicas.py -k batch_norm_called_twice",
    ),
    Mutation(
        "DP that does not split",
        "strategies/dp.py",
        "min((len(parts) for parts in split.values()), default=1)",
        "1",
        "tests/test_strategies.py -k dp_on_the_cpu",
    ),
    Mutation(
        "an effective batch without P",
        "strategies/process_group.py",
        "return self.data_parallel_size * N * K",
        "return N * K",
        "tests/test_strategies.py::test_effective_batches",
    ),
    # shards
    Mutation(
        "sharded: reduce every micro-batch",
        FSDP,
        'set_requires_gradient_sync(is_last or self.reduce == "micro_batch")',
        "set_requires_gradient_sync(True)",
        "'tests/test_sharded.py::test_collectives_of_a_window[window-3]'",
    ),
    Mutation(
        "sharded: average over the processes",
        FSDP,
        "part.set_gradient_divide_factor(1.0)",
        "part.set_gradient_divide_factor(2.0)",
        "'tests/test_sharded.py::test_fsdp_equals_one_big_batch[2-micro_batch]'",
    ),
    Mutation(
        "sharded: a norm of this process's part",
        FSDP,
        "        dist.all_reduce(square, group=self._shards)\n",
        "",
        "'tests/test_sharded.py::test_token_weights_and_clipping[window-0.1]'",
    ),
    Mutation(
        "sharded: reduce at one's own last micro-batch",
        FSDP,
        "            is_last = self._made + 1 == self._most\n",
        "            pass\n",
        "tests/test_sharded.py -k uneven_streams",
    ),
    Mutation(
        "sharded: reduce no zeros without data",
        "strategies/fsdp/collective_order.py",
        "self.groups[name].post_backward()",
        "pass",
        "'tests/test_sharded.py::test_processes_that_never_had_a_micro_batch_learn_the_order_from_the_others[2-1]'",
    ),
    Mutation(
        "sharded: go on from the middle of a forward that failed",
        "strategies/fsdp/collective_order.py",
        "        if self._place:  # it failed on the way\n",
        "        if False:\n",
        "tests/test_sharded.py -k forward_that_fails",
    ),
    Mutation(
        "sharded: validate with the list of the forwards before",
        FSDP,
        "            self._root.reset_iter_state()  # FSDP",
        "            pass  # FSDP",
        "tests/test_sharded.py::test_uneven_validation_between_updates",
    ),
    # interruptions
    Mutation(
        "forget the weight of the update before", LOOP, '"late_weight": self._late_weight', '"late_weight": 0.0', KILLED
    ),
    Mutation(
        "read the epoch again",
        "engine/data/map_style.py",
        "positions[0][1] if positions and positions[0][0] == epoch else 0",
        "0",
        KILLED,
    ),
    Mutation("forget the optimizer", DDP, "            load_named_state(", "            print(", KILLED),
    Mutation(
        "forget the schedule of the learning rate",
        "engine/checkpoint/snapshot.py",
        'trainer.lr_scheduler.load_state_dict(saved["lr_scheduler"])',
        "pass",
        KILLED,
    ),
    Mutation(
        "buffers as each process left them",
        DDP,
        "        self._broadcast_buffers_once()\n        return NOTHING_TO_DEFER if",
        "        is_last_microbatch and self._broadcast_buffers_once()\n        return NOTHING_TO_DEFER if",
        "tests/test_resume.py::test_buffers_that_forward_reads_are_those_of_the_checkpoint",
    ),
    Mutation(
        "write updates twice into the history",
        "engine/records/run_folder.py",
        "                if _is_before(line, update, validated):\n",
        "                if True:\n",
        KILLED,
    ),
    Mutation(
        "keep K instead of the effective batch on another P",
        "engine/trainer.py",
        "saved is not None and self._has_same_windows(saved)",
        "False",
        "tests/test_resume.py::test_a_run_goes_on_with_another_number_of_processes",
    ),
    Mutation(
        "stop alone",
        LOOP,
        "        if facts.abort:",
        "        if self._interrupts.requested:",
        "tests/test_interrupts.py::test_sigterm_at_random_moments",
    ),
    Mutation(
        "keep the buffers of a window that was dropped",
        LOOP,
        "                    buffer.copy_(self._buffers[name])",
        "                    pass",
        "tests/test_interrupts.py::test_a_window_that_is_dropped_leaves_no_trace_in_buffers",
    ),
    Mutation(
        "believe a checkpoint",
        "engine/checkpoint/files.py",
        '        if _sha256(file) != expected["sha256"]:',
        "        if False:",
        "tests/test_run_dir.py::test_a_damaged_checkpoint_is_named_and_the_one_before_is_used",
    ),
    Mutation(
        "save while updates are skipped",
        "engine/checkpoint/checkpointer.py",
        "self._folder is None or (self._trainer.skipped_in_a_row and not is_last)",
        "self._folder is None",
        "tests/test_interrupts.py -k finite",
    ),
    # what people see, and what they ask for
    Mutation(
        "let the schedule see the rate of a rule",
        LOOP,
        'group["lr"] = rate\n',
        "pass\n",
        "tests/test_lr_rules.py -k multiplies",
    ),
    Mutation(
        "report a rate without its factor", LOOP, "lr_factor * float(", "float(", "tests/test_lr_rules.py -k multiplies"
    ),
    Mutation(
        "train on with the average",
        "engine/callbacks/ema.py",
        "finally:\n            self._swap()",
        "finally:\n            pass",
        "tests/test_callbacks.py -k average",
    ),
    Mutation(
        "forget how long a stop has waited",
        "engine/callbacks/early_stopping.py",
        'self.best, self.waited = state["best"], state["waited"]',
        "pass",
        "tests/test_callbacks.py -k early",
    ),
    Mutation(
        "stop each process by itself",
        "engine/callbacks/early_stopping.py",
        "together=True",
        "together=False",
        "tests/test_callbacks.py -k early",
    ),
    Mutation(
        "make a schedule anew",
        "engine/callbacks/learning_rate.py",
        "group.update(values)",
        "pass",
        "tests/test_callbacks.py -k resume",
    ),
    Mutation(
        "look at the wait for the first micro-batch only",
        "engine/update/timing.py",
        "place = int(GOLDEN * update % 1.0 * window.stage.accumulate_grad_batches)",
        "place = 0",
        "tests/test_reduction.py -k another",
    ),
    Mutation(
        "call the wait for data computing",
        "engine/update/timing.py",
        "max(0.0, self.before - self.data)",
        "self.before",
        "tests/test_reduction.py -k goes",
    ),
    Mutation(
        "compute before a batch has arrived",
        "engine/data/prefetch.py",
        "self._computing.wait_event(moving.arrival)",
        "pass",
        "tests/test_prefetch.py -k waits",
    ),
    Mutation(
        "wait for each batch to arrive",
        BASE,
        "return batch.to(device, non_blocking=True)",
        "return batch.to(device)",
        "tests/test_device.py -k as_often",
    ),
    Mutation(
        "wait for each metric of a validation to arrive",
        "engine/training/validation.py",
        "metric.new_full((), size, dtype=torch.float64)",
        "torch.full((), size, dtype=torch.float64).to(metric.device)",
        "tests/test_device.py -k once_in_a_validation",
    ),
    Mutation(
        "overwrite a batch that is being read",
        "engine/data/prefetch.py",
        "self._stream.wait_stream(self._computing)",
        "pass",
        "tests/test_prefetch.py -k waits",
    ),
    Mutation(
        "keep every batch that was moved",
        "engine/data/prefetch.py",
        "self._being_read.clear()",
        "pass",
        "tests/test_prefetch.py -k kept",
    ),
    Mutation(
        "raise for a batch that was read ahead",
        "engine/data/prefetch.py",
        "then, error = end, met",
        "raise met",
        "tests/test_prefetch.py -k error",
    ),
    Mutation(
        "step as the run before",
        "strategies/optimizer_state.py",
        "for name in HOW_TO_STEP if name in group",
        "for name in ()",
        "tests/test_fused.py -k told",
    ),
    Mutation(
        "end while a thread is in the store",
        "strategies/status_board.py",
        "atexit.register(thread.join, PATIENCE)",
        "pass",
        "tests/test_silence.py -k interpreter",
    ),
    Mutation(
        "let a logger end the run",
        "engine/loggers/base.py",
        "except Exception as error:",
        "except ZeroDivisionError as error:",
        "tests/test_loggers.py -k away",
    ),
    Mutation(
        "keep rows that come again",
        "engine/loggers/csv_tables.py",
        " and int(number) <= update",
        "",
        "tests/test_loggers.py -k history",
    ),
    Mutation(
        "tell TensorBoard nothing of a resume",
        "engine/loggers/tensorboard_events.py",
        "purge_step=first",
        "purge_step=None",
        "tests/test_loggers.py -k history",
    ),
]


def copy_into(folder: str) -> Path:
    """Return a copy of the code in `folder`."""
    copy = Path(folder) / "tally"
    copy.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def test(copy: Path, selection: str) -> tuple[int, str]:
    """Run tests in a copy; return pytest's exit status and the name of the first that failed."""
    output = copy.parent / "output"
    process = FORK.Process(target=_test, args=(copy, selection, output))
    process.start()
    process.join()
    said = output.read_text()
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[| |$)", said, re.MULTILINE)
    return process.exitcode or 0, failed[1] if failed else said[-500:]


def _test(copy: Path, selection: str, output: Path) -> None:
    """Become a pytest in `copy`, as far as a test can see."""
    os.chdir(copy)
    sys.path = [str(copy), *(folder for folder in sys.path if folder != str(ROOT / "tests"))]
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    status = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *shlex.split(selection)])
    sys.stdout.flush()
    os._exit(status)


def apply(mutation: Mutation) -> str:
    """Break a copy; return the test that went red, or what is wrong in capitals."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_into(folder)
        file = copy / mutation.file
        source = file.read_text()
        if source.count(mutation.old) != 1:
            return f"NOT APPLIED: {mutation.old!r} stands {source.count(mutation.old)} times in {mutation.file}"
        file.write_text(source.replace(mutation.old, mutation.new))
        status, red = test(copy, mutation.tests)
    return f"`{red.removeprefix('tests/')}`" if status == 1 else f"SURVIVED (pytest ended with {status})"


def main(words: list[str]) -> int:
    """Apply all, print the table, return the exit status."""
    chosen = [m for m in MUTATIONS if not words or any(word in m.fault for word in words)]
    print("| fault | where | goes red |\n| --- | --- | --- |", flush=True)
    wrong = 0
    with ProcessPoolExecutor(WORKERS, FORK) as pool:
        for mutation, outcome in zip(chosen, pool.map(apply, chosen), strict=True):
            wrong += not outcome.startswith("`")
            print(f"| {mutation.fault} | `{mutation.file}` | {outcome} |", flush=True)
    print(f"\n{len(chosen) - wrong} of {len(chosen)} killed", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
