"""A model that torch.compile has compiled in place: names in checkpoints stay the user's."""

from torch import nn

from engine.errors import UserError
from strategies import Strategy


def check_compiles(compile_model: bool, strategy: Strategy) -> None:
    """Refuse a strategy under which nothing would be compiled. Raises UserError."""
    if compile_model and not strategy.compiles_in_place:
        raise UserError(
            f"compile_model=True: strategy {strategy.name!r} calls copies or parts of the model, and nothing "
            "would be compiled: compile its parts in configure_model(), or use single or ddp."
        )


def compile_in_place(model: nn.Module) -> None:
    """Let calls of `model` run what torch's default backend makes of it.

    `nn.Module.compile` by itself silently compiles nothing of a model whose class is torch's own (`nn.Sequential`): its
    top frame is one that torch never traces, unless it is wrapped.
    """
    import torch._dynamo  # slow to import: only here

    with torch._dynamo.config.patch(wrap_top_frame=True):
        model.compile()
