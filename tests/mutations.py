"""Break the engine on purpose, one fault at a time, and see a test go red for each.

    python tests/mutations.py              # all of them, two at a time, in copies: the code stays as it is
    python tests/mutations.py clip stream  # those whose name has one of these words
    python tests/mutations.py --check      # apply each in memory and run no test: a second

Prints the table of docs/testing.md. Fails if a fault survives, or no longer applies because its function has changed.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import processes  # noqa: F401 - torch, imported once: not by each pytest
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "strategies")
COPIED = (*PACKAGES, "launch", "tests", "pyproject.toml")
WORKERS = int(os.environ.get("TEST_WORKERS", "2"))
FORK = multiprocessing.get_context("fork")


class Fault(NamedTuple):
    """A fault: `old`, which stands once in `function`, becomes `new`, and one of `tests` must fail.

    `function` is the qualified name of a function or class in `engine/` or `strategies/`, such as "Plan.windows". If
    several modules have the name, their path comes first: "engine.order:shuffled". "engine.order:" is the whole module.
    """

    name: str
    function: str
    old: str
    new: str
    tests: str


class StaleFaultError(ValueError):
    """A fault does not apply: its function or its text is missing, or there are several."""


class Definition(NamedTuple):
    """A function or class: its module, and its text from `start` to `end`, decorators included."""

    module: str
    file: Path
    start: int
    end: int


TABLE = "tests/test_table.py::test_ddp_equals_one_big_batch"
TOKENS = "tests/test_tokens.py::test_tokens_weigh_alike_wherever_they_are"
STREAMS = "tests/test_streams.py::test_uneven_streams_equal_one_big_batch"
PREVIEW = "tests/test_preview.py::test_the_plan_is_what_the_run_does"
COUNTS = "tests/test_collectives.py::test_one_all_reduce_per_bucket_and_one_message_per_update"
LAYOUT = "tests/test_layout.py::test_every_layout_sees_the_same_samples_at_every_update_and_ends_alike"
DRAWS = "tests/test_layout.py::test_every_sample_and_micro_batch_of_every_epoch_draws_anew"

SAVEABLE = "tests/test_saveable.py"
TWO_MODELS = "tests/test_two_models.py"
WEIGHTS = "tests/test_tokens.py::test_weights_are_summed_exactly"
LATE = "tests/test_bad_input.py::test_the_loss_of_every_micro_batch_is_checked"
KILLED = "'tests/test_resume.py::test_killed_twice_and_continued_is_uninterrupted_to_the_bit[3-boundary]'"

IDENTITY, FOREIGN = "tests/test_run_identity.py", "tests/test_foreign_files.py"
LOSES = f"{IDENTITY}::test_a_run_that_loses_its_folder_saves_beside_it"

FAULTS = [
    # what a skipped update, and parameters and buffers that change in kind, must not spoil
    Fault(
        "keep a skipped update's buffers",
        "Updater.finish",
        "self.rollback.skip()",
        "pass",
        "tests/test_skipped.py",
    ),
    Fault("restore values only", "Buffers.restore", "buffers.update(kept)", "pass", "tests/test_skipped.py"),
    Fault("copy into another shape", "Buffers.keep", "kinds == self._kinds", "self._kinds", "tests/test_skipped.py"),
    Fault(
        "average over skipped updates",
        "EMA.on_update_end",
        "trainer.skipped > self._skipped",
        "False",
        "tests/test_skipped.py",
    ),
    Fault(
        "keep the wrapper of before an unfreezing",
        "DDPStrategy.start_window",
        "== self._requires_grad",
        "!= []",
        "tests/test_frozen.py",
    ),
    Fault(
        "forget what was frozen",
        "engine.checkpoint.snapshot:restore",
        'user_name(name) not in checkpoint["frozen"]',
        "parameter.requires_grad",
        "tests/test_frozen.py",
    ),
    Fault(
        "do not agree on what is frozen",
        "DDPStrategy.start_window",
        "self._agree_on_frozen()",
        "pass",
        "tests/test_replicas.py::test_parameters_frozen_on_one_process_are_an_error_on_all",
    ),
    Fault(
        "overlook parameters that come within an epoch",
        "Updater.begin",
        "self.optimizer.param_groups[-1] is not self._last_group",
        "False",
        "tests/test_frozen.py",
    ),
    Fault(
        "touch a parameter of the model for a process without data",
        "DDPStrategy.join",
        "trainable = [self._anchor]",
        "trainable = trainable[:1]",
        "tests/test_strategies.py::test_a_parameter_that_nobody_used_is_not_decayed_for_a_process_without_data",
    ),
    Fault("let a strategy have two models", "Strategy._take_model", "if self._has_model", "if False", TWO_MODELS),
    Fault(
        "take a gradient of another loss",
        "OwnWindow._read",
        "check_no_gradients(self._updater.model)",
        "pass",
        TWO_MODELS,
    ),
    Fault(
        "sum weights in float32", "LossSum._add_weight", "weight.detach().double()", "weight.detach().float()", WEIGHTS
    ),
    Fault(
        "check the first loss only", "LossSum.add", "or value.ndim or", "or (not self.samples and value.ndim) or", LATE
    ),
    Fault(
        "find at a save what cannot be saved", "Checkpointer.check", "is not None", "is None", "tests/test_saveable.py"
    ),
    Fault(
        "look at the start only for what cannot be saved",
        "Checkpointer.save_if_due",
        "not self._is_checked and",
        "False and",
        SAVEABLE,
    ),
    Fault(
        "leave buffers out that are not persistent",
        "UnsavedBuffers.load",
        "saved.items()",
        "{}.items()",
        SAVEABLE,
    ),
    Fault(
        "keep the shapes of the start", "take_shapes", "isinstance(value, Tensor)", "False", "tests/test_saveable.py"
    ),
    Fault(
        "leave our signal handlers in forked processes",
        "_restore_in_child",
        "for number in SIGNALS",
        "for number in ()",
        "tests/test_exit.py::test_processes_of_the_user_end_by_a_signal",
    ),
    Fault(
        "end the user's daemonic processes",
        "_end_children",
        "if child in _workers",
        "if child.daemon",
        "tests/test_exit.py::test_a_daemonic_process_of_the_user_is_left_to_its_exit_handler",
    ),
    Fault(
        "count calls of the model that prepare no reduction",
        "DDPStrategy._note_call",
        "|= torch.is_grad_enabled() and self._ddp.require_backward_grad_sync",
        "= True",
        "tests/test_model_attributes.py",
    ),
    Fault(
        "believe that a loss of no model depends on it",
        "DDPStrategy.backward",
        "is_last and not depends_on",
        "False and not depends_on",
        "tests/test_model_attributes.py",
    ),
    Fault(
        "give modules that share a buffer one each",
        "UnsavedBuffers.load",
        "_kind(value) == _kind(current)",
        "False",
        "tests/test_saveable.py::test_buffers_that_share_memory",
    ),
    Fault(
        "overlook optimizer state of no parameter",
        "check_snapshot",
        "if not isinstance(key, Tensor)",
        "if False",
        "tests/test_saveable.py::test_what_cannot_be_saved_is_refused_at_once",
    ),
    Fault(
        "look at the first numbers of a micro-batch only",
        "engine.data.counting:digest",
        ".reshape(-1)",
        ".reshape(-1)[:1024]",
        "tests/test_sample_counts.py",
    ),
    Fault(
        "forget the status that another process has left",
        "leave_status",
        "elif not Path(path).read_text()",
        "else",
        "tests/test_exit.py::test_a_status_that_another_process_has_left_stays",
    ),
    # the arithmetic of an update
    Fault(
        "divide by the nominal window",
        "Updater.finish",
        "self.scale.factor(agreed.weight)",
        "self.scale.factor(float(window.stage.effective_batch))",
        TABLE,
    ),
    Fault("divide by P twice", "DDPStrategy.backward", "scale * self.data_parallel_size)", "scale)", TABLE),
    Fault("average the averages of ragged micro-batches", "LossSum.add", "= loss, micro.size", "= loss, 1", TABLE),
    Fault(
        "divide by this process's weight",
        "Updater.finish",
        "self.scale.factor(agreed.weight)",
        "self.scale.factor(float(self.losses._weight))",
        TOKENS,
    ),
    Fault(
        "divide by the weight of the update before",
        "Scale.factor",
        "self._unit / weight if weight else 1.0",
        "1.0",
        TOKENS,
    ),
    Fault(
        "a unit that processes do not share",
        "Updater.finish",
        "self.scale.end(agreed.weight, overflowed)",
        "self.scale.end(float(self.losses.samples), overflowed)",
        TOKENS,
    ),
    Fault(
        "apply the scale twice",
        "Scale.begin",
        "self._loss_scale.value / self._unit",
        "self._loss_scale.value / self._unit**2",
        TABLE,
    ),
    Fault(
        "leave fp16's scale in the gradient",
        "Scale.factor",
        "correction / self._loss_scale.value",
        "correction",
        "tests/test_precision.py",
    ),
    Fault(
        "step on a window of weight 0",
        "Updater.finish",
        "skipped = overflowed or agreed.weight == 0",
        "skipped = overflowed",
        "tests/test_tokens.py::test_a_window_of_weight_zero_is_a_skipped_update",
    ),
    Fault(
        "step on a gradient that is not finite",
        "Updater.finish",
        "overflowed = self._skips_nonfinite and",
        "overflowed = False and",
        "tests/test_loop.py::test_an_update_that_is_not_finite_is_skipped_on_all_processes",
    ),
    Fault(
        "clip each micro-batch",
        "Strategy.run_window",
        "                self.backward(loss, scale)\n",
        "                self.backward(loss, scale)\n                self.clip(0.05)\n",
        "tests/test_table.py::test_clipping_acts_on_the_whole_gradient_of_an_update",
    ),
    Fault(
        "clip before the correction",
        "Strategy.clip",
        "            norm = norm * factor\n",
        "            pass\n",
        "tests/test_strategies.py::test_clip_is_that_of_torch_after_the_factor",
    ),
    Fault(
        "gradients leak into the next window",
        "Updater.finish",
        "self.strategy.clear_gradients()",
        "self.optimizer.zero_grad()",
        "tests/test_loop.py::test_gradients_that_no_optimizer_holds_do_not_leak_into_the_next_window",
    ),
    Fault(
        "move the learning rate with each micro-batch",
        "Updater.before_forward",
        "        if micro.is_last:\n",
        "        self.lr_scheduler and self.lr_scheduler.step()\n        if micro.is_last:\n",
        "tests/test_loop.py::test_the_learning_rate_moves_once_per_update",
    ),
    Fault(
        "report this process's loss",
        "Updater.finish",
        "mean = agreed.loss / agreed.weight",
        "mean = self.losses.read()[1] / agreed.weight",
        "tests/test_loop.py::test_the_loss_of_a_record_is_the_mean_over_its_window",
    ),
    # windows and data
    Fault(
        "the boundary one micro-batch late",
        "PlannedWindow.micro_batches",
        "piece + P >= pieces",
        "piece + P > pieces",
        COUNTS,
    ),
    Fault(
        "the boundary one micro-batch early",
        "PlannedWindow.micro_batches",
        "piece + P >= pieces",
        "piece + 2 * P >= pieces",
        COUNTS,
    ),
    Fault(
        "drop the tail",
        "Plan.windows",
        "            yield PlannedWindow(offset, stop, stage)",
        "            if stop - offset == stage.effective_batch:\n"
        "                yield PlannedWindow(offset, stop, stage)",
        TABLE,
    ),
    Fault(
        "cut micro-batches by P",
        "PlannedWindow.micro_batches",
        "piece * N, min((piece + 1) * N,",
        "piece * N, min((piece + 1) * N + P - 1,",
        TABLE,
    ),
    Fault(
        "spread a window unevenly",
        "PlannedWindow.count",
        "min(self.samples, -(-pieces // P) * P) if spread else pieces",
        "pieces",
        "tests/test_plan.py",
    ),
    Fault(
        "count one update too few",
        "Plan.updates",
        "end - stage.first) * -(-self.samples",
        "end - stage.first - 1) * -(-self.samples",
        "tests/test_plan.py",
    ),
    Fault(
        "plan nominal windows",
        "planned_updates",
        "before[window.stop] - before[window.start], window",
        "window.stage.effective_batch, window",
        PREVIEW,
    ),
    Fault("plan the learning rate one update late", "planned_updates", "lrs[number] *", "lrs[number - 1] *", PREVIEW),
    Fault(
        "plan the bytes of float32",
        "DDPStrategy.bytes_to_reduce",
        "p.numel() * p.element_size()",
        "p.numel() * 4",
        PREVIEW,
    ),
    Fault(
        "change K one epoch late",
        "Schedule._after",
        "return bisect_right(self.stages, place,",
        "return bisect_right(self.stages, place - 1,",
        "tests/test_plan.py",
    ),
    Fault("the same order in every epoch", "_generator", "PCG64([seed, epoch])", "PCG64([seed])", LAYOUT),
    Fault(
        "seed the dataset without the epoch",
        "Fetch._seed_all",
        "FETCH_STREAM, epoch, place",
        "FETCH_STREAM, place",
        DRAWS,
    ),
    Fault("seed the model without the epoch", "forward_seed", "MODEL_STREAM, epoch)", "MODEL_STREAM)", DRAWS),
    Fault(
        "seed the model by process",
        "Updater.before_forward",
        "self.strategy.seed(self._epoch_seed",
        "self.strategy.seed(self.strategy.rank + self._epoch_seed",
        "tests/test_layout.py::test_dropout_and_augmentation_do_not_know_P",
    ),
    Fault(
        "a stream that ends within a window has no last micro-batch",
        "StreamWindow.__iter__",
        "index == last or not has_more",
        "index == last",
        STREAMS,
    ),
    Fault(
        "a process's own end ends the epoch",
        "Updater.finish",
        "window.close(agreed.has_more > 0, samples)",
        "window.close(window.has_more, samples)",
        STREAMS,
    ),
    Fault(
        "count padded validation samples twice",
        "Validation.run",
        "means[name] = total / weight if",
        "means[name] = sum(r[name][0] / r[name][1] for r in everyone if name in r) / len(everyone) if",
        "tests/test_loop.py::test_a_validation_mean_is_that_over_all_samples_once",
    ),
    # processes
    Fault(
        "reduce every micro-batch",
        "DDPStrategy.accumulation_context",
        "sync = is_last_microbatch",
        "sync = True",
        COUNTS,
    ),
    Fault(
        "the context around backward only",
        "Strategy.run_window",
        "            with self.accumulation_context(micro.is_last):\n                loss, scale = forward(micro)\n",
        "            loss, scale = forward(micro)\n            with self.accumulation_context(micro.is_last):\n",
        COUNTS,
    ),
    Fault(
        "skip the pass of a process without data",
        "DDPStrategy.join",
        "            super().backward(self._ddp(), 1.0)",
        "            pass",
        "'tests/test_streams.py::test_uneven_streams_equal_one_big_batch[[0, 1]-even]'",
    ),
    Fault(
        "let DDP reorder its buckets in the second window",
        "DDPStrategy.prepare",
        "        self._fix_buckets()\n",
        "",
        "tests/test_strategies.py::test_a_rerun_sums_in_the_same_order_to_the_bit",
    ),
    Fault(
        "believe that every gradient was reduced",
        "DDPStrategy.backward",
        "            self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]",
        "            pass",
        "tests/test_strategies.py::test_a_gradient_that_was_not_reduced_is_an_error_that_names_it",
    ),
    Fault(
        "do not compare replicas",
        "Session._run_epoch",
        "        self._updater.exchange.check_replicas(state.update)\n",
        "",
        "tests/test_replicas.py::test_replicas_that_diverge_stop_the_run_on_all_processes",
    ),
    Fault(
        "buffers in each forward",
        "DDPStrategy.wrap",
        "            **_buffers_are_ours(),\n",
        "",
        "tests/test_replicas.py -k batch_norm_called_twice",
    ),
    Fault(
        "DP that does not split",
        "strategies.dp:_split",
        "min((len(parts) for parts in split.values()), default=1)",
        "1",
        "tests/test_strategies.py -k dp_on_the_cpu",
    ),
    Fault(
        "an effective batch without P",
        "ProcessGroupStrategy.effective_batch",
        "return self.data_parallel_size * N * K",
        "return N * K",
        "tests/test_strategies.py::test_effective_batches",
    ),
    # shards
    Fault(
        "sharded: reduce every micro-batch",
        "FSDPStrategy._start_pass",
        'set_requires_gradient_sync(is_last or self.reduce == "micro_batch")',
        "set_requires_gradient_sync(True)",
        "'tests/test_sharded.py::test_collectives_of_a_window[window-3]'",
    ),
    Fault(
        "sharded: average over the processes",
        "FSDPStrategy.prepare",
        "part.set_gradient_divide_factor(1.0)",
        "part.set_gradient_divide_factor(2.0)",
        "'tests/test_sharded.py::test_fsdp_equals_one_big_batch[2-micro_batch]'",
    ),
    Fault(
        "sharded: a norm of this process's part",
        "FSDPStrategy._norm",
        "        dist.all_reduce(square, group=self._shard_group)\n",
        "",
        "'tests/test_sharded.py::test_token_weights_and_clipping[window-0.1]'",
    ),
    Fault(
        "sharded: reduce at one's own last micro-batch",
        "FSDPStrategy._start_pass",
        "            is_last = self._passes_made + 1 == self._most_passes\n",
        "            pass\n",
        "tests/test_sharded.py -k uneven_streams",
    ),
    Fault(
        "sharded: reduce no zeros without data",
        "CollectiveOrder.finish",
        "self.groups[name].post_backward()",
        "pass",
        "'tests/test_sharded.py::test_processes_that_never_had_a_micro_batch_learn_the_order_from_the_others[2-1]'",
    ),
    Fault(
        "sharded: go on from the middle of a forward that failed",
        "CollectiveOrder.finish",
        "if self._position:  #",
        "if False:  #",
        "tests/test_sharded.py -k forward_that_fails",
    ),
    Fault(
        "sharded: validate with the list of the forwards before",
        "FSDPStrategy._gathered",
        "            self._root.reset_iter_state()  # FSDP",
        "            pass  # FSDP",
        "tests/test_sharded.py::test_uneven_validation_between_updates",
    ),
    # interruptions
    Fault(
        "forget the weight of the update before",
        "Scale.state_dict",
        '"late_weight": self._late_weight',
        '"late_weight": 0.0',
        KILLED,
    ),
    Fault(
        "read the epoch again",
        "MapSource.windows",
        "positions[0][1] if positions and positions[0][0] == epoch else 0",
        "0",
        KILLED,
    ),
    Fault(
        "forget the optimizer",
        "DDPStrategy.load_state_dict",
        "            load_named_state(",
        "            print(",
        KILLED,
    ),
    Fault(
        "forget the schedule of the learning rate",
        "engine.checkpoint.snapshot:restore",
        'parts.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])',
        "pass",
        KILLED,
    ),
    Fault(
        "buffers as each process left them",
        "DDPStrategy.accumulation_context",
        "self._broadcast_buffers_once()",
        "pass",
        "tests/test_resume.py::test_buffers_that_forward_reads_are_those_of_the_checkpoint",
    ),
    Fault(
        "write updates twice into the history",
        "RunFolder.rewind",
        " if history.keeps(line))",
        " if history.keeps(line) or True)",
        KILLED,
    ),
    # the folder of a run
    Fault(
        "save into whatever is at the path",
        "Checkpointer.save",
        "self.run_folder is not None and self.run_folder.is_lost",
        "False",
        f"{LOSES} {IDENTITY}::test_all_processes_hear_that_the_folder_is_lost",
    ),
    Fault(
        "know a folder by inode alone",
        "RunFolder.is_lost",
        '(read_mark(self.path) or {}).get("start", self._start) != self._start',
        "False",
        LOSES,
    ),
    Fault("know a folder by its ids alone", "RunFolder.is_lost", "return not is_same or", "return", LOSES),
    Fault(
        "leave the records in a folder that is lost",
        "RunFolder.rescue",
        "file.readall() +",
        'b"" +',
        LOSES,
    ),
    Fault(
        "reopen tables by the folder's name",
        "RunFolder.pinned",
        "return path if path.exists() else self.path",
        "return self.path",
        f"{IDENTITY}::test_tables_follow_a_folder_that_is_moved",
    ),
    Fault(
        "decide before the lock what is resumed",
        "Checkpointer._open",
        "self._contents() != self._found",
        "False",
        f"{IDENTITY}::test_of_two_starts_the_second_is_refused_even_after_the_first_has_ended",
    ),
    Fault(
        "decide before the lock that a folder is empty",
        "RunFolder.__init__",
        "            _check_is_free(self.path, takes_over)  #",
        "            pass  #",
        f"{IDENTITY}::test_a_folder_that_fills_before_its_lock_is_free_is_refused",
    ),
    Fault(
        "lock out other processes only",
        "engine.records.lock:_try",
        "if holder is not None and not holder.closed:",
        "if False:",
        f"{IDENTITY}::test_two_trainers_of_one_process_are_two_runs",
    ),
    Fault(
        "keep the lock of a start that failed",
        "Trainer.fit",
        "checkpointer.close()",
        "                    pass\n",
        f"{IDENTITY}::test_a_start_that_fails_leaves_the_folder_free",
    ),
    Fault(
        "follow a link later than at the start",
        "engine.checkpoint.checkpointer:_real",
        "Path(run_dir).resolve()",
        "Path(run_dir)",
        f"{IDENTITY}::test_a_link_to_a_run_is_that_run {IDENTITY}::test_a_run_may_change_its_working_folder",
    ),
    Fault(
        "give two commands one folder",
        "_claim_fresh_folder",
        "mkdir(parents=True)",
        "mkdir(parents=True, exist_ok=True)",
        f"{IDENTITY}::test_two_commands_of_one_second_have_a_folder_each",
    ),
    Fault(
        "resume from another run's checkpoint",
        "engine.checkpoint.files:verify",
        '(manifest.get("run") or run) != run',
        "False",
        f"{IDENTITY}::test_a_checkpoint_of_another_run_is_passed_over",
    ),
    Fault(
        "save before the records are on disk",
        "CheckpointWriter._write",
        "            self._first()\n",
        "",
        f"{IDENTITY}::test_records_are_on_disk_before_the_checkpoint_that_counts_them",
    ),
    Fault(
        "miss a hole in the history",
        "History._see",
        "            self._note_missing(update - 1)\n",
        "",
        f"{IDENTITY}::test_a_resume_tells_of_updates_that_are_missing_or_stand_twice",
    ),
    Fault(
        "miss an update that stands twice",
        "History._see",
        "if update <= self._last:",
        "if False:",
        f"{IDENTITY}::test_a_resume_tells_of_updates_that_are_missing_or_stand_twice",
    ),
    # files from somebody else
    Fault(
        "follow links in a run's folder",
        "check_plain",
        "if is_shared or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):",
        "if is_shared:",
        f"{FOREIGN}::test_a_link_or_device_in_a_run_folder_is_refused",
    ),
    Fault(
        "append to a file with another name elsewhere",
        "check_plain",
        "if is_shared or not",
        "if not",
        f"{FOREIGN}::test_a_file_that_has_another_name_elsewhere_stays_as_it_is_there",
    ),
    Fault(
        "write through a link to the page",
        "new_part",
        "if os.path.lexists(part):",
        "if False:",
        f"{FOREIGN}::test_a_report_follows_no_link",
    ),
    Fault(
        "read a line without end",
        "lines_of",
        "if len(line) > LONGEST:",
        "if False:",
        f"{FOREIGN}::test_a_line_without_end_is_refused",
    ),
    Fault(
        "take any position",
        "Checkpoint._check",
        "_expect(all(0 <= count < LARGEST_COUNT for count in counts)",
        "_expect(True",
        f"{FOREIGN}::test_an_impossible_position_is_refused",
    ),
    Fault(
        "start from weights with NaN",
        "load_weights",
        "value.float().isnan().any()",
        "False",
        f"{FOREIGN}::test_weights_that_are_not_numbers_are_refused",
    ),
    Fault(
        "write out aliases that multiply",
        "engine.cli.main:_size",
        "if size > MOST_VALUES:",
        "if False:",
        f"'{FOREIGN}::test_an_option_file_is_read_or_refused_in_a_line[aliases]'",
    ),
    Fault(
        "wait for an option file that is a pipe",
        "engine.cli.main:parse",
        "if os.path.exists(value) and not (",
        "if False and not (",
        f"'{FOREIGN}::test_an_option_file_is_read_or_refused_in_a_line[pipe]'",
    ),
    Fault(
        "keep K instead of the effective batch on another P",
        "lay_out",
        "checkpoint is not None and _has_same_windows(checkpoint, window_identity(settings, scheduling))",
        "False",
        "tests/test_resume.py::test_a_run_goes_on_with_another_number_of_processes",
    ),
    Fault(
        "stop alone",
        "Updater.finish",
        "if agreed.abort:",
        "if self.signals.stop_requested:",
        "tests/test_interrupts.py::test_sigterm_at_random_moments",
    ),
    Fault(
        "keep the buffers of a window that was dropped",
        "Rollback.undo",
        "self._buffers.restore()",
        "pass",
        "tests/test_interrupts.py::test_a_window_that_is_dropped_leaves_no_trace_in_buffers",
    ),
    Fault(
        "believe a checkpoint",
        "verify",
        '        if _sha256(file) != expected["sha256"]:',
        "        if False:",
        "tests/test_run_dir.py::test_a_damaged_checkpoint_is_named_and_the_one_before_is_used",
    ),
    Fault(
        "save while updates are skipped",
        "Checkpointer.save",
        "self._folder is None or (self._state.skipped_in_a_row and not is_last)",
        "self._folder is None",
        "tests/test_interrupts.py -k finite",
    ),
    # what people see, and what they ask for
    Fault(
        "let the schedule see the rate of a rule",
        "_scaled_lr",
        'group["lr"] = rate\n',
        "pass\n",
        "tests/test_lr_rules.py -k multiplies",
    ),
    Fault(
        "report a rate without its factor",
        "Updater.finish",
        "lr_factor * float(",
        "float(",
        "tests/test_lr_rules.py -k multiplies",
    ),
    Fault(
        "plot what never changes",
        "engine.report.page:_data",
        "or not is_constant(values)",
        "or len(values)",
        "tests/test_report.py -k never_changes",
    ),
    Fault(
        "name only the processes of the last start",
        "engine.report.facts:facts",
        "_stages(processes) or begin",
        "begin",
        "tests/test_report.py -k processes_are_those",
    ),
    Fault(
        "give a row to what took no time",
        "engine.report.page:_split",
        "if seconds >= LEAST * total",
        "if total",
        "tests/test_report.py -k took_no_time",
    ),
    Fault(
        "take infinity for a number",
        "engine.report.reading:number",
        "abs(value) <= 1e300",
        "value == value",
        "tests/test_report.py -k odd_numbers",
    ),
    Fault(
        "train on with the average",
        "EMA.around_validation",
        "finally:\n            self._swap()",
        "finally:\n            pass",
        "tests/test_callbacks.py -k average",
    ),
    Fault(
        "forget how long a stop has waited",
        "EarlyStopping.load_state_dict",
        'self.best, self.waited = state["best"], state["waited"]',
        "pass",
        "tests/test_callbacks.py -k early",
    ),
    Fault(
        "stop each process by itself",
        "EarlyStopping._stop_if_due",
        "is_collective=True",
        "is_collective=False",
        "tests/test_callbacks.py -k early",
    ),
    Fault(
        "make a schedule anew",
        "EpochLR.on_fit_start",
        "group.update(values)",
        "pass",
        "tests/test_callbacks.py -k resume",
    ),
    Fault(
        "look at the wait for the first micro-batch only",
        "UpdateTimer.watch",
        "index = int(GOLDEN * update % 1.0 * window.stage.accumulate_grad_batches)",
        "index = 0",
        "tests/test_reduction.py -k another",
    ),
    Fault(
        "call the wait for data computing",
        "Times.computing",
        "max(0.0, self.before - self.data)",
        "self.before",
        "tests/test_reduction.py -k goes",
    ),
    Fault(
        "compute before a batch has arrived",
        "Prefetch.to_device",
        "self._computing.wait_event(moving.arrival)",
        "pass",
        "tests/test_prefetch.py -k waits",
    ),
    Fault(
        "wait for each batch to arrive",
        "move",
        "return batch.to(device, non_blocking=True)",
        "return batch.to(device)",
        "tests/test_device.py -k as_often",
    ),
    Fault(
        "wait for each metric of a validation to arrive",
        "Validation._pair",
        "metric.new_full((), micro.size, dtype=torch.float64)",
        "torch.full((), micro.size, dtype=torch.float64).to(metric.device)",
        "tests/test_device.py -k once_in_a_validation",
    ),
    Fault(
        "overwrite a batch that is being read",
        "Prefetch.start",
        "self._stream.wait_stream(self._computing)",
        "pass",
        "tests/test_prefetch.py -k waits",
    ),
    Fault(
        "keep every batch that was moved",
        "Prefetch.start",
        "self._being_read.clear()",
        "pass",
        "tests/test_prefetch.py -k kept",
    ),
    Fault(
        "raise for a batch that was read ahead",
        "Prefetch.one_ahead",
        "then, error = end, met",
        "raise met",
        "tests/test_prefetch.py -k error",
    ),
    Fault(
        "step as the run before",
        "load_named_state",
        "for name in HOW_TO_STEP if name in group",
        "for name in ()",
        "tests/test_fused.py -k told",
    ),
    Fault(
        "end while a thread is in the store",
        "StatusBoard._patiently",
        "atexit.register(thread.join, PATIENCE)",
        "pass",
        "tests/test_silence.py -k interpreter",
    ),
    Fault(
        "leave a loader's workers to Python's exit",
        "engine.signals:_end_children",
        "child.kill()",
        "pass",
        "tests/test_exit.py -k workers",
    ),
    Fault(
        "die of a signal after the save",
        "Command.end",
        "signal.signal(number, signal.SIG_IGN)",
        "signal.signal(number, signal.SIG_DFL)",
        "tests/test_exit.py -k any_moment",
    ),
    Fault(
        "give signals back before all is closed",
        "Trainer.fit",
        "self.strategy.teardown()",
        "signals.close(), self.strategy.teardown()",
        "tests/test_interrupts.py -k closes",
    ),
    Fault(
        "heed signals in Python alone",
        "Command.begin",
        "signal.set_wakeup_fd(writer, warn_on_full_buffer=False)",
        "pass",
        "tests/test_exit.py -k vain",
    ),
    Fault(
        "end with the reader of stdout",
        "Output.write",
        "suppress(OSError, ValueError)",
        "suppress(ValueError)",
        "tests/test_exit.py -k output",
    ),
    Fault(
        "fail on text that the terminal cannot show",
        "Output.write",
        "except UnicodeEncodeError:",
        "except ZeroDivisionError:",
        "tests/test_exit.py -k escapes",
    ),
    Fault(
        "take any rank",
        "strategies.environment:_number",
        "below is not None and value >= below",
        "False",
        "tests/test_exit.py -k environment",
    ),
    Fault(
        "call a full disk an error of the task",
        "engine.errors:writing",
        "except (OSError, SafetensorError) as error:",
        "except ZeroDivisionError as error:",
        "tests/test_exit.py -k failure",
    ),
    Fault(
        "tell errors as they are",
        "engine.errors:describe",
        '.encode(errors="backslashreplace").decode()',
        "",
        "tests/test_exit.py -k odd",
    ),
    Fault(
        "keep records of short numbers only",
        "engine.records.run_folder:_plain",
        "abs(value) < 2**63",
        "True",
        "tests/test_exit.py -k records",
    ),
    Fault(
        "show any number in a report",
        "engine.report.facts:_whole",
        "plotted := number(value)",
        "plotted := value",
        "tests/test_report.py -k odd",
    ),
    Fault(
        "let a logger end the run",
        "_Guarded._try",
        "except Exception as error:",
        "except ZeroDivisionError as error:",
        "tests/test_loggers.py -k away",
    ),
    Fault(
        "keep rows that come again",
        "engine.loggers.csv_tables:_is_before",
        " and int(number) <= update",
        "",
        "tests/test_loggers.py -k history",
    ),
    Fault(
        "tell TensorBoard nothing of a resume",
        "TensorBoardLogger.open",
        "purge_step=first",
        "purge_step=None",
        "tests/test_loggers.py -k history",
    ),
    # the samples of a micro-batch
    Fault(
        "the planned number of samples instead of the collated one",
        "MapSource._micros",
        "size = size if problem else self._batch_size(batch)",
        "problem = ''",
        "tests/test_sample_counts.py",
    ),
    Fault(
        "believe dim 0 of the first tensor of a stream",
        "size_problem",
        "len(seen) == 1",
        "True",
        "tests/test_sample_counts.py::test_a_stream_whose_tensors_disagree_asks_for_the_number",
    ),
    Fault(
        "a dataset that leaves samples out",
        "Fetch.__getitems__",
        "len(samples) != len(piece.indices)",
        "False",
        "tests/test_sample_counts.py::test_a_dataset_that_returns_fewer_samples_is_refused",
    ),
    Fault(
        "packed sequences counted by their steps",
        "tensors",
        "int(item.batch_sizes[0])",
        "item.data.size(0)",
        "tests/test_sample_counts.py::test_packed_and_nested_tensors_are_counted_by_sequences",
    ),
    Fault(
        "the same stream on all processes",
        "StreamSource._check_first",
        "return digests if",
        "return [] if",
        "tests/test_sample_counts.py::test_the_same_stream_on_all_processes_is_refused",
    ),
    Fault(
        "refuse equal micro-batches that hold nothing",
        "digest",
        ">= INFORMATION",
        ">= 0",
        "tests/test_sample_counts.py::test_micro_batches_that_may_be_equal_by_chance_are_not_refused",
    ),
    Fault(
        "ask the sampler that a batch sampler replaces",
        "engine.data.stream:_sampler",
        "loader if batches is None else batches",
        "loader",
        "tests/test_sample_counts.py::test_a_batch_sampler_of_ones_own_shares_the_samples",
    ),
    # the model that is validated
    Fault(
        "validate a new model after fit",
        "Trainer.validate",
        "if self._trained is None:",
        "if self.task is not task:",
        "tests/test_validate.py",
    ),
    Fault(
        "validate a new model instead of a checkpoint's",
        "first_model",
        "load_checkpoint(model, checkpoint, strategy.device)",
        "pass",
        "tests/test_validate.py",
    ),
    Fault(
        "validate a checkpoint without its average",
        "first_model",
        'restore_callbacks(callbacks, checkpoint["callbacks"])',
        "pass",
        "tests/test_validate.py",
    ),
    Fault(
        "validate a new model for a folder without a checkpoint",
        "first_model",
        "if checkpoint is None and settings.weights is None",
        "if False",
        "tests/test_validate.py",
    ),
    Fault(
        "a trainer that runs within itself",
        "Trainer._alone",
        "if self._is_running:",
        "if False:",
        "tests/test_validate.py",
    ),
    # a loop of one's own
    Fault(
        "a loop that calls backward twice",
        "OwnWindow.backward",
        "if self._micro is None:",
        "if False:",
        "tests/test_own_loop.py",
    ),
    Fault(
        "a loop that leaves out a backward",
        "OwnWindow._read",
        "if self._micro is not None:",
        "if False:",
        "tests/test_own_loop.py",
    ),
    Fault(
        "a loop that updates twice", "OwnWindow.update", "if self._was_updated:", "if False:", "tests/test_own_loop.py"
    ),
    Fault(
        "a loop's error that the others do not hear of",
        "OwnWindow._stop",
        "self._updater.exchange.stop(error)",
        "pass",
        "tests/test_own_loop.py",
    ),
    Fault(
        "a loop's error inside no_sync",
        "OwnWindow.backward",
        "self._batches.close()",
        "pass",
        "tests/test_own_loop.py",
    ),
    Fault(
        "an optimizer that does not work on shards",
        "FSDPStrategy.prepare_optimizer",
        "check_optimizer(optimizer)",
        "pass",
        "tests/test_sharded.py -k cannot_do",
    ),
    Fault(
        "a gradient of a gradient under FSDP in torch's words",
        "FSDPStrategy.backward",
        "check_double_backward(error)",
        "pass",
        "tests/test_sharded.py -k cannot_do",
    ),
    # the model that loss() is given
    Fault(
        "reduce only what the wrapper's forward has seen",
        "DDPStrategy.backward",
        "if is_last and (self.find_unused_parameters or not self._was_called):",
        "if False:",
        "tests/test_model_attributes.py",
    ),
    Fault(
        "an attribute that is set on the wrapper",
        "ShowsModel.__setattr__",
        "setattr(self.module, name, value)",
        "super().__setattr__(name, value)",
        "tests/test_model_attributes.py",
    ),
    # one clear message
    Fault(
        "a dictionary as a dataset",
        "is_map_style",
        "if isinstance(data, Mapping):",
        "if False:",
        "tests/test_bad_input.py",
    ),
    Fault("an order that cannot be cut", "check_order", "not is_cut", "False", "tests/test_bad_input.py"),
    Fault(
        "an error that a callback's hides",
        "Trainer._report",
        "except Exception:",
        "except ZeroDivisionError:",
        "tests/test_bad_input.py::test_a_callback_that_raises_hides_no_error",
    ),
    Fault(
        "options beside a class path",
        "_with_init_args",
        'if "class_path" not in parts',
        "if True",
        "tests/test_command.py::test_options_may_stand_beside_a_class_path",
    ),
    Fault(
        "a restored stream that loses samples",
        "StreamSource._compare_length",
        "self._length not in (0, length)",
        "False",
        "tests/test_streams.py::test_a_restored_stream_that_loses_samples_is_told",
    ),
    Fault(
        "forget the length of the epoch before",
        "StreamWindow.position",
        '"length_before": self._length_before',
        '"length_before": 0',
        "tests/test_streams.py::test_a_restored_stream_that_loses_samples_is_told",
    ),
    Fault(
        "the same window asked for with another K is another run",
        "engine.checkpoint.snapshot:_identity",
        'if here != checkpoint["schedule"]:',
        "if True:",
        "tests/test_resume.py -k window_of",
    ),
    Fault(
        "any window is the same run",
        "engine.checkpoint.snapshot:_identity",
        'if here != checkpoint["schedule"]:',
        "if False:",
        "tests/test_resume.py -k window_of",
    ),
    Fault(
        "refuse streams that only begin alike",
        "StreamSource.windows",
        "self._strategy.gather(digest(stream.ahead))",
        "digests",
        "tests/test_sample_counts.py::test_streams_that_only_begin_alike_are_not_refused",
    ),
    Fault(
        "a wrapper that sets its own names on the model",
        "ShowsModel.__setattr__",
        '"_is_built" not in self.__dict__ or',
        "",
        "tests/test_model_attributes.py",
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


@lru_cache(maxsize=1)
def definitions(root: Path) -> dict[str, list[Definition]]:
    """Return the functions and classes of the packages in `root` by qualified name, and each module as "path:"."""
    found: dict[str, list[Definition]] = {}

    def visit(parent: ast.AST, prefix: str) -> None:
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                visit(node, prefix)
                continue
            first = min(part.lineno for part in (node, *node.decorator_list))
            assert node.end_lineno is not None
            found.setdefault(prefix + node.name, []).append(
                Definition(module, file, lines[first - 1], lines[node.end_lineno])
            )
            visit(node, f"{prefix}{node.name}.")

    for file in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        source = file.read_text()
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        lines = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
        found[f"{module}:"] = [Definition(module, file, 0, len(source))]
        visit(ast.parse(source), "")
    return found


def locate(function: str, root: Path = ROOT) -> list[Definition]:
    """Return the definitions of `function`, all in one module: several for a property and its setter, say.

    Raises StaleFaultError if there is no such function, or if several modules have one.
    """
    known = definitions(root)
    module, colon, name = function.rpartition(":")
    if not name:
        places = known.get(function, [])
    else:
        places = [place for place in known.get(name, []) if not colon or place.module == module]
    modules = sorted({place.module for place in places})
    if len(modules) > 1:
        choices = ", ".join(f"{module}:{name}" for module in modules)
        raise StaleFaultError(f"{function!r} is in several modules. Use one of {choices}.")
    if not places:
        last = name.rpartition(".")[2]
        same = [other for other in known if last and other.rpartition(".")[2] == last]
        similar = same or get_close_matches(name or function, known)
        raise StaleFaultError(f"{function!r} is missing. Similar: {', '.join(similar) or 'nothing'}.")
    return places


def broken(fault: Fault, root: Path = ROOT) -> tuple[Path, str]:
    """Return the file of `root` that has the fault, and its text with the fault.

    Raises StaleFaultError if the fault does not apply, or if Python cannot read the result.
    """
    places = locate(fault.function, root)
    file = places[0].file
    source = file.read_text()
    counts = [source.count(fault.old, place.start, place.end) for place in places]
    if sum(counts) != 1:
        raise StaleFaultError(f"{fault.old!r} stands {sum(counts)} times in {fault.function}, in {file}")
    start = source.index(fault.old, places[counts.index(1)].start)
    changed = source[:start] + fault.new + source[start + len(fault.old) :]
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise StaleFaultError(f"{fault.new!r} in {fault.function}: {error}") from error
    return file, changed


def apply(fault: Fault) -> str:
    """Break a copy; return the test that went red, or what is wrong in capitals."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_into(folder)
        try:
            file, changed = broken(fault, copy)
        except StaleFaultError as error:
            return f"NOT APPLIED: {error}"
        file.write_text(changed)
        status, red = test(copy, fault.tests)
    return f"`{red.removeprefix('tests/')}`" if status == 1 else f"SURVIVED (pytest ended with {status})"


def check(faults: list[Fault]) -> int:
    """Apply all in memory, print those that are stale, return the exit status."""
    stale = 0
    for fault in faults:
        try:
            broken(fault)
        except StaleFaultError as error:
            stale += 1
            print(f"{fault.name}: {error}")
    print(f"{len(faults) - stale} of {len(faults)} apply")
    return 1 if stale else 0


def main(arguments: list[str]) -> int:
    """Apply all, print the table, return the exit status."""
    words = [word for word in arguments if word != "--check"]
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if "--check" in arguments:
        return check(chosen)
    print("| fault | where | goes red |\n| --- | --- | --- |", flush=True)
    wrong = 0
    with ProcessPoolExecutor(WORKERS, FORK) as pool:
        for fault, outcome in zip(chosen, pool.map(apply, chosen), strict=True):
            wrong += not outcome.startswith("`")
            print(f"| {fault.name} | `{fault.function}` | {outcome} |", flush=True)
    print(f"\n{len(chosen) - wrong} of {len(chosen)} killed", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
