"""The order of collectives under FSDP, recorded in a pass with data, so that processes without take part."""

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from strategies.torch_internals import complete_gradients, end_fsdp_backward, has_gradient, reset_fsdp

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
END = "end"
PAUSE = 0.002  # seconds between two reads of the store, in a first pass without data


class CollectiveOrder:
    """The order of the collectives in a pass of a model: a forward and backward, or one of the two.

    `root` is the model; `units` are its FSDP modules with parameters, by name. `processes` share `store`, and wait in
    it for at most `timeout`. With `stays_gathered` only the first pass of a window gathers, and forwards that keep no
    graph. Each kind of pass has an order of its own.
    """

    def __init__(
        self,
        root: FSDPModule,
        units: dict[str, FSDPModule],
        store: Any,
        processes: int,
        timeout: timedelta,
        stays_gathered: bool,
    ) -> None:
        self._root, self._units = root, units
        self._store, self._processes, self._timeout = store, processes, timeout
        self._stays_gathered = stays_gathered
        self._recorded: dict[str, list[str]] = {}
        self._known: set[str] = set()
        self._kind = ""
        self._passes = self._position = 0
        self._waits = False
        self.is_open = False  # whether a pass has started and not ended
        self.used: set[Any] = set()  # FSDP's parameters that had a gradient to reduce, since the set was cleared
        root._get_fsdp_state()._lazy_init()
        self.groups: dict[str, Any] = {name: unit._get_fsdp_state()._fsdp_param_group for name, unit in units.items()}
        for name in units:
            self._follow(name)

    def start(self, kind: str, gathers: bool) -> None:
        """Start a FORWARD, a BACKWARD, or BOTH. `gathers` says that it gathers even if parameters stay gathered."""
        self._kind = f"{kind} first" if self._stays_gathered and gathers else kind
        if self._kind not in self._known and (derived := self._derived(kind)) is not None:
            self._recorded[self._kind] = derived
            self._known.add(self._kind)
        self._order = self._recorded.setdefault(self._kind, [])
        self.is_open, self._position, self._waits = True, 0, False
        self._passes += 1

    def end(self) -> None:
        """End a pass with data. Raises RuntimeError if it made fewer collectives than the first pass."""
        self._note(END)
        self._known.add(self._kind)
        self.is_open = False

    def finish(self) -> bool:
        """Take part in the rest of a pass without data; return False if no process has data to lead it."""
        self.is_open = False
        if self._position or self._kind.startswith(BACKWARD):  # its forward or backward failed, or is left out
            reset_fsdp(self._root)
        while (event := self._next()) != END:
            if event is None:
                return False
            kind, _, name = event.partition(" ")
            if kind == "gather":
                self._units[name].unshard()
                self._units[name].reshard()
            else:
                self.groups[name].post_backward()
            self._position += 1
        self._known.add(self._kind)
        if not self._kind.startswith(FORWARD):
            end_fsdp_backward(self._root)
        return True

    def _derived(self, kind: str) -> list[str] | None:
        """Return the order that other kinds of pass imply, for one that no process leads; None if unknown."""
        if self._stays_gathered and self._kind == kind:
            known = next((self._recorded[other] for other in (f"{BOTH} first", BACKWARD) if other in self._known), None)
            return None if known is None else [event for event in known if event.startswith("reduce")]
        forward = self._kind.replace(kind, FORWARD)
        if kind == BOTH and {forward, BACKWARD} <= self._known:
            return self._recorded[forward] + self._recorded[BACKWARD]
        return None

    def _follow(self, name: str) -> None:
        """Wrap the methods of a unit that communicate: FSDP has no hooks there."""
        group = self.groups[name]
        unshard, post_backward = group.unshard, group.post_backward

        def noted_unshard(async_op: bool = False) -> None:
            if self.is_open and group._all_gather_result is None and not group.is_unsharded:
                self._note(f"gather {name}")
            unshard(async_op)

        def noted_post_backward(*unused: Any) -> None:
            if self.is_open:
                self._note(f"reduce {name}")
            if group.reduce_grads:
                self.used.update(p for p in group.fsdp_params if has_gradient(p))
                complete_gradients(group.fsdp_params)
            post_backward(*unused)

        group.unshard, group.post_backward = noted_unshard, noted_post_backward

    def _note(self, event: str) -> None:
        """Advance by one event. Raises RuntimeError if another event was due."""
        if self._kind in self._known:
            due = self._order[self._position] if self._position < len(self._order) else END
        else:
            due = self._store.compare_set(f"{self._kind} {self._position}", "", event).decode()
            if due != END:
                self._order.append(due)
        if due != event:
            raise RuntimeError(
                f"FSDP: a micro-batch made {event!r} where another one made {due!r}. Each must call the same units in "
                "the same order. Make a unit that is not always called part of a larger one (wrap=...)."
            )
        self._position += 1

    def _next(self) -> str | None:
        """Return the next event of the pass; None if all processes wait for it."""
        if self._position < len(self._order):
            return self._order[self._position]
        if self._kind in self._known:
            return END
        key, waiting = f"{self._kind} {self._position}", f"waiting {self._passes}"
        end = time.monotonic() + self._timeout.total_seconds()
        if not self._waits:
            self._waits = True
            self._store.add(waiting, 1)
        while True:
            is_there = self._store.check([key])  # before the count: a later pass may make it, once all have waited
            if self._store.add(waiting, 0) == self._processes:
                return None
            if is_there:
                break
            if time.monotonic() > end:
                raise dist.DistStoreError("no process has made the next collective of the first micro-batch")
            time.sleep(PAUSE)
        event: str = self._store.get(key).decode()
        if event != END:
            self._order.append(event)
        return event
