"""Replay: one update of a window whose loss needs all of its outputs, so that its micro-batches run twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map_only

from engine.data.generators import restore, saved
from engine.data.window import Window
from engine.errors import UserError, describe
from engine.memory import is_out_of_memory
from engine.seeds import seed_host
from engine.signals import Interrupted
from engine.state import RunState
from engine.update.message import NO_REQUESTS, Outcome, Requests
from engine.update.updater import Updater
from engine.update.window_outputs import JoinedOutputs, Outputs, check_outputs, detached, differences, surrogate
from strategies import Buffers, MicroBatch


class ReplayUpdater(Updater):
    """Makes one update of each window by a loss of all its outputs, over all processes.

    First pass: a forward of each micro-batch; the last keeps its graph. The outputs are gathered, and each process
    takes the gradient of the loss with respect to its own. The last micro-batch's backward comes first. Second pass:
    forward and backward of the others, with the draws and buffers of the first pass; the last of them is reduced.
    `window_loss` is that of a `WindowTask`, `keeps_on_host` its `keeps_batches_on_host`; the rest are `Updater`'s.
    """

    def __init__(self, window_loss: Callable[[Mapping[str, Tensor]], Tensor], keeps_on_host: bool, *args: Any) -> None:
        super().__init__(*args)
        self._window_loss, self._keeps_on_host = window_loss, keeps_on_host
        self.scale.is_final, self.exchange.sends_at_start = True, False
        self._joined = JoinedOutputs(self.strategy)
        self._before: list[_ForwardState] = []  # the state before the first forward of each micro-batch, by index
        self._after = _ForwardState(self.model)  # the state after the first pass, in which the window ends

    def run(self, loss_of: Any, window: Window, state: RunState, requests: Requests = NO_REQUESTS) -> Outcome:
        """Run one window and make its update; `loss_of` is `WindowTask.outputs`. Otherwise as `Updater.run`."""
        self._loss_of = loss_of
        self.begin(window, state, requests)
        try:
            self._run_twice(window, state.update)
        except Exception as error:
            self.exchange.stop(error)
        outcome = self.finish(window, state)
        size = float(self._joined.bytes * self.strategy.data_parallel_size)
        return outcome if outcome.aborted else outcome._replace(metrics={**outcome.metrics, "window_bytes": size})

    def _run_twice(self, window: Window, update: int) -> None:
        strategy = self.strategy
        with ExitStack() as context:  # of the last micro-batch: its backward follows its forward
            first = self._first_pass(window, update, context)
            gradients = self._gradients(first, update)
            if not first.micros:
                self.exchange.send()
                strategy.join(window)
                return
            loss = surrogate(first.last_outputs, gradients[-1], self.losses.scale)
            if len(first.micros) == 1:
                self.exchange.send()
            strategy.backward(loss, 1.0)
        self._second_pass(first, gradients)
        self._after.restore()

    def _first_pass(self, window: Window, update: int, context: ExitStack) -> _FirstPass:
        """Run a forward of each micro-batch; the last one keeps its graph, and its context is entered in `context`."""
        first = _FirstPass()
        try:
            for index, micro in enumerate(self.timer.watch(window, update)):
                first.micros.append(micro)
                if micro.is_last:
                    context.enter_context(self.strategy.accumulation_context(index == 0))
                    first.last_outputs = self._outputs(micro, index)
                    first.outputs[micro.seed_index] = detached(first.last_outputs)
                    continue
                with self.strategy.first_pass():
                    first.outputs[micro.seed_index] = self._outputs(micro, index)
                if self._keeps_on_host:
                    micro.batch = tree_map_only(Tensor, Tensor.cpu, micro.batch)
        except Exception as error:
            if self.strategy.has_lost_contact(error):
                raise
            first.problem = error  # the others wait for this process's outputs: it has to tell them
        self._after.keep()
        return first

    def _second_pass(self, first: _FirstPass, gradients: list[dict[str, Tensor]]) -> None:
        """Run forward and backward of each micro-batch but the last; the final one of them is reduced."""
        differ: list[Tensor] = []
        again = first.micros[:-1]
        for index, (micro, outputs_before) in enumerate(zip(again, first.outputs.values(), strict=False)):
            is_final = index == len(again) - 1
            with self.strategy.accumulation_context(is_final):
                self._before[index].restore()
                outputs = self._outputs(micro, index, is_replay=True)
                differ.append(differences(outputs_before, outputs))
                loss = surrogate(outputs, gradients[index], self.losses.scale)
                if is_final:
                    self._check_replay(differ, again)
                    self.exchange.send()
                self.strategy.backward(loss, 1.0)

    def _outputs(self, micro: MicroBatch, index: int, is_replay: bool = False) -> Outputs:
        """Run the forward of a micro-batch; the first time, keep the state before it."""
        if not is_replay:
            if index == len(self._before):
                self._before.append(_ForwardState(self.model))
            self._before[index].keep()
        self.before_forward(micro)
        batch = self.strategy.to_device(micro.batch) if is_replay and self._keeps_on_host else micro.batch
        outputs = check_outputs(self._loss_of(self.model, batch), micro)
        if self.logged and not is_replay and self.losses.is_recorded:
            self.exchange.means.log(self.logged, micro)
        self.logged.clear()
        return outputs

    def _gradients(self, first: _FirstPass, update: int) -> list[dict[str, Tensor]]:
        """Return the gradients of the loss by micro-batch. Raises this pass's problem, or Interrupted for another's."""
        self.strategy.end_first_pass(first.problem is None and bool(first.micros))
        all_are_here = self._joined.join(first.outputs if first.problem is None else None)
        if first.problem is not None:
            raise first.problem
        if not all_are_here:
            raise Interrupted
        seed = self._epoch_seed ^ update  # the same draws on all processes
        self.strategy.seed(seed)
        seed_host(seed)
        self.losses.samples = samples = sum(micro.size for micro in first.micros)
        try:
            loss, gradients = self._joined.gradients(self._window_loss, self._parameters)
        except Exception as error:
            if is_out_of_memory(error):
                what = f"window_loss() does not fit into memory, whatever the micro-batches: {describe(error)}"
                raise UserError(f"{what} Use a smaller effective batch, or tiles as in engine.losses.") from None
            raise
        if self.logged and samples and self.losses.is_recorded:  # the same on all processes
            self.exchange.means.log(self.logged, MicroBatch(None, samples, 0, is_last=True))
        self.logged.clear()
        self._after.restore_host()
        self.losses.add_window(loss, samples, len(gradients))
        return gradients

    def _check_replay(self, differ: list[Tensor], micros: list[MicroBatch]) -> None:
        flags = torch.stack(differ).tolist()
        if not any(flags):
            return
        index, where = flags.index(True), "a module"
        if self.strategy.holds_model:  # its forward communicates otherwise
            where = self._first_to_differ(micros[index], index) or "outputs()"
        raise UserError(
            f"the second forward of a micro-batch differs from the first: {where} draws from a generator of its own, "
            "or keeps state. Use torch's global generator, or a registered buffer for state."
        )

    def _first_to_differ(self, micro: MicroBatch, index: int) -> str | None:
        """Return the module whose output is the first to differ between two forwards."""
        names = {module: name.removeprefix("module.") for name, module in self.model.named_modules()}
        runs: list[list[tuple[nn.Module, Any]]] = []
        with register_module_forward_hook(lambda module, inputs, output: runs[-1].append((module, output))):
            for _ in range(2):
                runs.append([])
                with torch.no_grad():
                    self._before[index].restore()
                    self._outputs(micro, index, is_replay=True)
        for (module, first), (_, second) in zip(*runs, strict=False):
            if isinstance(first, Tensor) and not torch.equal(first.nan_to_num(), second.nan_to_num()):
                return f"module {names.get(module, type(module).__name__)!r}"
        return None


@dataclass
class _FirstPass:
    """The micro-batches of a window on this process, and what their first forwards gave."""

    micros: list[MicroBatch] = field(default_factory=list)
    outputs: dict[int, Outputs] = field(default_factory=dict)  # without graphs, by seed index
    last_outputs: Outputs = field(default_factory=dict)  # those of the last micro-batch, with their graph
    problem: Exception | None = None


class _ForwardState:
    """The state that a forward reads: buffers and the host's generators. Torch's generators are seeded instead."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = Buffers(model)

    def keep(self) -> None:
        if self._buffers.exist:
            self._buffers.keep()
        self._host = saved()

    def restore(self) -> None:
        if self._buffers.exist:
            self._buffers.restore()
        self.restore_host()

    def restore_host(self) -> None:
        restore(*self._host)
