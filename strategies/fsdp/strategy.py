"""Fully sharded data parallelism: each process holds a part of the model, by FSDP2's `fully_shard`."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from strategies.buffers import Buffers
from strategies.environment import new_store
from strategies.errors import UserError, check_count
from strategies.fsdp.collective_order import CollectiveOrder
from strategies.fsdp.gathered_steps import GatheredSteps, need_whole
from strategies.fsdp.passes import Passes
from strategies.fsdp.units import check_units, in_lists, of_classes
from strategies.optimizer_state import user_module, user_name
from strategies.process_group import ProcessGroupStrategy
from strategies.single import NOTHING_TO_DEFER
from strategies.torch_internals import FSDP, is_freed_storage, reduce_unused, reset_fsdp

_BROADCAST_BYTES = 1 << 28  # bytes of one broadcast of buffers

Dtype = Literal["float32", "bfloat16", "float16"]


class FSDPStrategy(ProcessGroupStrategy):
    """Shard parameters, gradients and optimizer state over P processes, by FSDP2's `fully_shard`.

    A unit's parameters are gathered for its forward, freed, and gathered again for its backward. Each of the P
    processes trains on different samples. The options:

    - `reduce`: "window" reduces gradients once per window and unit; until then each process keeps a whole gradient.
      "micro_batch" reduces at each micro-batch and keeps only a shard: less memory, K times the traffic.
    - `shard_size`: hybrid sharding over `shard_size` neighbouring processes; other groups of that size hold replicas.
      None: sharded over all.
    - `reshard_after_forward`: True frees every unit after its forward, None all but the root (FSDP's default). False
      keeps parameters from the window's first forward to its last backward: gathered once per window, more memory.
    - `param_dtype`: the dtype of forward, backward and gathered parameters; outputs are float32. `reduce_dtype`: the
      dtype in which gradients are accumulated and cross the wire, float32 if `param_dtype` is given.
    - `wrap`: the names of the classes whose instances become units. None: the children of each outermost ModuleList.
      The rest of the model is one unit. Override `units` for another choice.
    - `find_unused_parameters`: a parameter that no process used in a window keeps the gradient None, at the cost of a
      small all-reduce. If it is False, a parameter that a process with data did not use is an error.
    - `broadcast_buffers`: process 0's buffers (BatchNorm's statistics) go to all once per window. If it is False, each
      process has its own. A checkpoint holds those of process 0, so a resumed run differs if forward reads them.

    All processes make the same number of passes in a window: one with fewer micro-batches takes part with weight 0. So
    each micro-batch must call the same units in the same order; otherwise a RuntimeError names the two units.

    `timeout_seconds` bounds every wait for another process, `device` is "cpu" or "cuda" (default: CUDA if available).
    """

    name = "fsdp"
    supports_variable_windows = True
    compiles_in_place = False
    holds_model = False
    supports_open_windows = False
    _torch_parts = FSDP
    _mesh: DeviceMesh

    def __init__(
        self,
        reduce: Literal["window", "micro_batch"] = "window",
        shard_size: int | None = None,
        reshard_after_forward: bool | None = None,
        param_dtype: Dtype | None = None,
        reduce_dtype: Dtype | None = None,
        wrap: Sequence[str] | None = None,
        find_unused_parameters: bool = False,
        broadcast_buffers: bool = True,
        timeout_seconds: float = 300.0,
        device: Literal["cpu", "cuda"] | None = None,
    ) -> None:
        super().__init__(timeout_seconds, device)
        if reduce not in ("window", "micro_batch"):
            raise UserError(f"reduce={reduce!r}: expected 'window' or 'micro_batch'.")
        if reshard_after_forward not in (None, True, False):
            raise UserError(f"reshard_after_forward={reshard_after_forward!r}: expected True, False or None.")
        for option, dtype in (("param_dtype", param_dtype), ("reduce_dtype", reduce_dtype)):
            if dtype not in (None, "float32", "bfloat16", "float16"):
                raise UserError(f"{option}={dtype!r}: expected 'float32', 'bfloat16', 'float16' or None.")
        if shard_size is not None:
            check_count("shard_size", shard_size, why="Use None to shard over all processes.")
        self.reduce = reduce
        self.defers_reduction = reduce == "window"
        self.shard_size = shard_size
        self.reshard_after_forward = reshard_after_forward
        self.param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype or ("float32" if param_dtype else None)
        self.wrap = wrap if wrap is None else list(wrap)
        self.find_unused_parameters = find_unused_parameters
        self.broadcast_buffers = broadcast_buffers
        self._root: Any = None

    def accumulation_context(self, is_last_microbatch: bool) -> AbstractContextManager[Any]:
        """Make the window's last pass reduce, or each pass. FSDP reads it in backward."""
        if self.runs_twice:
            self._passes.finish_forwards(but=1)
        self._passes.start(is_last_microbatch)
        return NOTHING_TO_DEFER

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        self._passes.start(False)
        with torch.no_grad():
            yield
        self._order.end()
        self._passes.end_forward()

    def end_first_pass(self, has_output: bool) -> None:
        if has_output:
            self._passes.end()
            self._passes.start(self._passes.is_last)
        else:
            self._passes.finish_forwards()

    def describe(self) -> str:
        replicas = self.data_parallel_size // (self.shard_size or self.data_parallel_size)
        return super().describe() + (f", {replicas} replicas" if replicas > 1 else "")

    def setup(self) -> None:
        """Join the processes. Raises UserError unless `shard_size` divides them, RuntimeError if torch lacks a part."""
        P, size = self.data_parallel_size, self.shard_size or self.data_parallel_size
        if P % size:
            raise UserError(f"shard_size={size}: expected a divisor of the {P} processes. Use one, or None.")
        super().setup()
        shape, names = ((P,), ("shard",)) if size == P else ((P // size, size), ("replicate", "shard"))
        self._mesh = init_device_mesh(self._device_type, shape, mesh_dim_names=names)

    def teardown(self) -> None:
        """Destroy the groups that `setup` made; in an existing group, those of the shards are left too."""
        if self._owns_group:
            self._root = None
            vars(self).pop("_mesh", None)
        super().teardown()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Give all processes the parameters of process 0 and shard them. Raises UserError if FSDP cannot."""
        self._take_model()
        self._model = model
        module = self._user_module
        units = self.units(module)
        check_units(module, units)
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), 0, group=self._host_group if tensor.device.type == "cpu" else None)
        dtypes = [None if name is None else getattr(torch, name) for name in (self.param_dtype, self.reduce_dtype)]
        policy, frees = MixedPrecisionPolicy(*dtypes), self.reshard_after_forward  # type: ignore[arg-type]
        for unit in units:
            fully_shard(unit, mesh=self._mesh, reshard_after_forward=frees is not False, mp_policy=policy)
        policy = replace(policy, output_dtype=torch.float32 if self.param_dtype else None)
        self._root = fully_shard(module, mesh=self._mesh, reshard_after_forward=bool(frees), mp_policy=policy)
        named = {name or "(root)": m for name, m in module.named_modules() if isinstance(m, FSDPModule)}
        for part in named.values():
            part.set_gradient_divide_factor(1.0)  # a sum, not a mean
            part.set_force_sum_reduction_for_comms(True)
        reduce_unused(self._root)
        named = {name: part for name, part in named.items() if part._get_fsdp_state()._fsdp_param_group is not None}
        self._order = CollectiveOrder(self._root, named, new_store(), self.processes, self.timeout, frees is False)
        self._parameters = list(model.parameters())
        self._requires_grad = [p.requires_grad for p in self._parameters]
        self._buffers = Buffers(model)
        parts = [p for group in self._order.groups.values() for p in group.fsdp_params]
        self._trainable = [p for p in parts if p.sharded_param.requires_grad]
        self._passes = Passes(self._root, self._order, not self.defers_reduction, frees, self._broadcast_buffers_once)
        return model

    def units(self, model: nn.Module) -> list[nn.Module]:
        """Return the submodules that are gathered and reduced as units. Override it for another choice."""
        return list(dict.fromkeys(in_lists(model))) if self.wrap is None else of_classes(model, self.wrap)

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Gather whole parameters for optimizers that need them. Raises UserError if such an optimizer has modes."""
        if parts := need_whole(optimizer):
            self._shards = GatheredSteps(optimizer, self._shard_group, parts)

    def start_window(self, most_micro_batches: int) -> None:
        """Note the number of passes in the next window. Raises UserError if a parameter was frozen or unfrozen."""
        if [p.requires_grad for p in self._parameters] != self._requires_grad:
            before = zip(self._model.named_parameters(), self._requires_grad, strict=True)
            changed = [user_name(name) for (name, p), required in before if p.requires_grad != required]
            raise UserError(
                f"requires_grad of {', '.join(changed[:3])} changed during training: expected it to stay, since FSDP "
                "reads it when it shards the model. Use DDPStrategy, or freeze in configure_model() only."
            )
        self._passes.start_window(most_micro_batches, self.runs_twice)

    def backward(self, loss: Tensor, scale: float | Tensor) -> None:
        """Add `scale x d(loss)`; after this process's last micro-batch, take part in the passes of the others."""
        try:
            super().backward(loss, scale)
            self._passes.end()
        except Exception as error:
            if self._passes.is_last and not self.has_lost_contact(error):
                self._passes.finish()  # the others read of the failure after their passes
            if is_freed_storage(error):
                raise UserError(
                    "the loss has a gradient of a gradient (create_graph=True), which FSDP cannot compute: it frees "
                    "parameters after the first backward. Use strategy 'ddp'."
                ) from error
            raise
        if self._passes.is_last:
            self._passes.finish()
            self._forget_unused() if self.find_unused_parameters else self._check_used()

    def join(self, window: Any) -> None:
        """Take part in the rest of the window's passes without data: gather for the others, and reduce zeros."""
        if not self._order.is_open:
            self._passes.start(True)
        self._passes.finish()
        if self.find_unused_parameters:
            self._forget_unused()

    @contextmanager
    def evaluation_context(self, model: nn.Module) -> Iterator[None]:
        """Gather the whole model once. Raises UserError for a model whose process group has ended."""
        module = user_module(model)
        if not isinstance(module, FSDPModule):
            yield
            return
        if module is not self._root:
            raise UserError(
                "the model's shards are on processes whose group has ended. Validate during fit, keep your own process "
                "group open around both, or load model.safetensors."
            )
        units = [m for m in self._root.modules() if isinstance(m, FSDPModule)]
        self._root.set_reshard_after_forward(False)
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            self._root.set_reshard_after_forward(self.reshard_after_forward is not False)
            self._root.set_reshard_after_forward(bool(self.reshard_after_forward), recurse=False)
            reset_fsdp(self._root)  # FSDP keeps a list of forwards for the next backward

    def fingerprint(self) -> int:
        """Return a number that is equal on all replicas under hybrid sharding; 0 without replicas."""
        if self._mesh.ndim == 1:
            return 0
        total = torch.tensor(super().fingerprint(), device=self.device)
        dist.all_reduce(total, group=self._shard_group)
        return int(total)

    def reductions(self) -> tuple[int, int]:
        """Return (collectives, bytes of gradients) of one window, or of one micro-batch with reduce="micro_batch"."""
        groups = [g for g in self._order.groups.values() if any(p.sharded_param.requires_grad for p in g.fsdp_params)]
        size = sum(
            p.sharded_param.numel() * (p.reduce_dtype or p.param_dtype or p.orig_dtype).itemsize
            for p in self._trainable
        )
        shards = dist.get_world_size(self._shard_group)
        return len(groups) * self._mesh.ndim, size + (size // shards if self._mesh.ndim == 2 else 0)

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
        if optimizer is not None:
            state = {**state, "optimizer": {**state["optimizer"], "state": self._sharded(state["optimizer"]["state"])}}
        modules, own = self._user_module.named_modules, self._user_module.state_dict()
        again = {*dict(modules(remove_duplicate=False))} - {*dict(modules())}  # torch shards a module's first name only
        aliases = {n: v for n, v in own.items() if isinstance(v, DTensor) and n.rpartition(".")[0] in again}
        state = {**state, "model": {**state["model"], **aliases}}
        super().load_state_dict(state, optimizer)

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _gradients(self) -> list[Tensor]:
        return [self._local(gradient) for gradient in super()._gradients()]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        local = super()._norm(gradients)
        square = local.double() ** 2
        dist.all_reduce(square, group=self._shard_group)
        return square.sqrt().to(local.dtype)

    def _copied(self, tensor: Tensor) -> Tensor:
        """The whole tensor on the CPU; of a sharded one, which process 0 writes, the others return only the shape."""
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return super()._copied(whole) if self.rank == 0 or whole is tensor else whole.to("meta")

    def _sharded(self, states: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state with this process's shards. Raises UserError for another shape."""
        whole = self._shards.held if self._shards is not None else ()
        parameters = {user_name(name): p for name, p in self._user_module.named_parameters() if p not in whole}

        def shard(name: str, value: Any) -> Any:
            parameter = parameters.get(name)
            if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(parameter, DTensor):
                return value
            if value.shape != parameter.shape:
                seen, expected = tuple(value.shape), tuple(parameter.shape)
                raise UserError(f"the optimizer's state of {name} has shape {seen}: expected {expected}.")
            value = value.to(parameter.device)
            return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

        return {name: {key: shard(name, value) for key, value in state.items()} for name, state in states.items()}

    @property
    def _shard_group(self) -> dist.ProcessGroup:
        """The processes that share one model."""
        return self._mesh.get_group("shard")

    def _broadcast_buffers_once(self) -> None:
        if self._buffers.exist and self.broadcast_buffers:
            broadcast: Any = dist._broadcast_coalesced  # type: ignore[attr-defined]
            broadcast(dist.group.WORLD, self._buffers.tensors(), _BROADCAST_BYTES, 0)

    def _check_used(self) -> None:
        if unused := [str(p._param_fqn) for p in self._trainable if p not in self._order.used]:
            raise RuntimeError(
                f"process {self.rank}: no micro-batch of the window used these parameters: {', '.join(unused)}. Their "
                "gradients would be zero instead of None. Use FSDPStrategy(find_unused_parameters=True) "
                "(--trainer.strategy=strategies.FSDPStrategy --trainer.strategy.find_unused_parameters=true)."
            )

    def _forget_unused(self) -> None:
        """Give parameters that no process used the gradient None."""
        used = torch.tensor([p in self._order.used for p in self._trainable], dtype=torch.int32, device=self.device)
        for parameter, was_used in zip(self._trainable, self.all_reduce(used, "max").tolist(), strict=True):
            if not was_used:
                parameter.sharded_param.grad = None
