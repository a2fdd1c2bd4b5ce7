"""Models of other authors: two language models, with checkpointing and compilation, and a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from engine import Callback, GradientAccumulationScheduler, Loss, Task, Trainer
from engine.seeds import MODEL_STREAM, ODD, mix
from strategies import DDPStrategy
from tests.kit.processes import on_processes, run
from tests.kit.reference import Regression, big_batch_run, in_order, parameters

transformers = pytest.importorskip("transformers")

VOCABULARY, MASK, IGNORED, LR = 50, 1, -100, 0.5
SAMPLES, N = 20, 3  # 7 micro-batches, the last of 2: short windows, and at P = 2 a process without a micro-batch

Adapt = Callable[[nn.Module], nn.Module]
"""What is done to a model before it trains."""


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def checkpointed(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def sum_and_weight(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """By hand: the models' own losses are means, and in float32."""
    inputs, attended, targets = batch
    logits = model(input_ids=inputs, attention_mask=attended).logits.transpose(1, 2)
    total = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()


class Language(Task):
    """Sequences of 2 to 12 tokens, padded to the longest of their micro-batch; a new order in each epoch."""

    def __init__(self, adapt: Adapt = as_it_is, **config: int) -> None:
        self.adapt, self.config = adapt, config
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(2, 13, (SAMPLES,), generator=generator).tolist()
        tokens = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]
        self.samples = [self.sample(t, torch.rand(len(t), generator=generator)) for t in tokens]

    def sample(self, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs, and the target of each."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        raise NotImplementedError

    def configure_model(self) -> nn.Module:
        return self.adapt(self.build().double().train())

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=LR)

    def train_data(self) -> Any:
        return self.samples

    def order(self, epoch: int) -> list[int]:
        return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()

    def collate(self, samples: list[Any]) -> Any:
        inputs, targets = zip(*samples, strict=True)
        attended = [torch.ones_like(sequence) for sequence in inputs]
        return pad_sequence(inputs, True), pad_sequence(attended, True), pad_sequence(targets, True, IGNORED)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        return Loss(*sum_and_weight(model, batch))


class Causal(Language):
    """GPT-2 predicts each next token; its embedding is its output layer too."""

    def sample(self, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return tokens, nn.functional.pad(tokens[1:], (0, 1), value=IGNORED)

    def build(self) -> nn.Module:
        sizes = {"vocab_size": VOCABULARY, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | ends | self.config)))


class Masked(Language):
    """BERT predicts some tokens of long sequences: many samples have none, and some micro-batches."""

    def sample(self, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        is_masked = (noise < 0.3) & (len(tokens) > 8)
        return tokens.where(~is_masked, MASK), tokens.where(is_masked, IGNORED)

    def build(self) -> nn.Module:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        limits = {"vocab_size": VOCABULARY, "max_position_embeddings": 12}
        return transformers.BertForMaskedLM(transformers.BertConfig(**(sizes | limits | self.config)))


def big_batches(task: Language, P: int, Ks: Sequence[int], in_one_forward: bool = False) -> Tensor:
    """The reference: for each update ONE loss, ONE gradient and plain SGD; K by epoch.

    For dropout, forward takes the micro-batches one by one, each after the seed of its place in the epoch. That formula
    is what the engine promises; nothing else here is the engine's.
    """
    torch.manual_seed(0)
    model = task.configure_model()
    for epoch, K in enumerate(Ks):
        order = task.order(epoch)
        for start in range(0, SAMPLES, P * K * N):
            stop = min(start + P * K * N, SAMPLES)
            size = stop - start if in_one_forward else N
            parts = []
            for place in range(start, stop, size):
                torch.manual_seed((mix(0, MODEL_STREAM, epoch) + place * ODD) & 0xFFFFFFFFFFFFFFFF)
                rows = order[place : min(place + size, stop)]
                parts.append(sum_and_weight(model, task.collate([task.samples[row] for row in rows])))
            total, weight = map(sum, zip(*parts, strict=True))
            if weight == 0:
                continue
            gradients = torch.autograd.grad(total / weight, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= LR * g
    return parameters(model)


class Names(Callback):
    """Keeps the names that weights are saved under."""

    def on_fit_end(self, trainer: Any) -> None:
        self.found = list(trainer.strategy.state_dict()["model"])


def fit(task: Language, Ks: Sequence[int], strategy: str = "ddp") -> tuple[Tensor, list[str]]:
    names = Names()
    callbacks = [GradientAccumulationScheduler(dict(enumerate(Ks))), names]
    trainer = Trainer(strategy, micro_batch_size=N, max_epochs=len(Ks), callbacks=callbacks)
    trainer.fit(task)
    return parameters(trainer.model), names.found


def assert_fits(P: int, task: Language, Ks: Sequence[int], reference: Tensor) -> None:
    for found, _ in run(P, fit, task, Ks):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)


def test_the_cases_are_what_they_are_meant_to_be() -> None:
    task = Masked()
    weights = [(task.samples[row][1] != IGNORED).sum().item() for row in task.order(0)]
    assert 0 in [sum(weights[place : place + N]) for place in range(0, SAMPLES, N)]
    for task_class in (Causal, Masked):
        drawn, plain = (big_batches(task_class(adapt), 1, [4]) for adapt in (as_it_is, without_dropout))
        assert (drawn - plain).abs().max() > 1e-3
    model: Any = Causal().configure_model()
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("task_class", [Causal, Masked])
def test_an_update_is_that_of_its_big_batch_with_the_same_dropout(task_class: Any, P: int, K: int) -> None:
    assert_fits(P, task_class(), [K, K], big_batches(task_class(), P, [K, K]))


@pytest.mark.parametrize(("P", "K"), [(1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("task_class", [Causal, Masked])
def test_without_dropout_it_is_that_of_one_padded_forward(task_class: Any, P: int, K: int) -> None:
    task = task_class(without_dropout)
    assert_fits(P, task, [K, K], big_batches(task, P, [K, K], in_one_forward=True))


def test_every_layout_trains_the_same_model_with_dropout() -> None:
    reference = big_batches(Causal(), 1, [4, 4])
    for P, K in [(1, 4), (2, 2), (4, 1)]:
        assert_fits(P, Causal(), [K, K], reference)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_changes_nothing() -> None:
    task, calls = Causal(checkpointed), []
    model: Any = task.configure_model()
    model.transformer.h[0].attn.register_forward_pre_hook(lambda *_: calls.append("forward"))
    sum_and_weight(model, task.collate(task.samples[:N]))[0].backward()
    assert calls == ["forward", "forward"]  # it does compute again in backward
    assert_fits(2, task, [2, 2], big_batches(Causal(), 2, [2, 2]))


def compiled(model: nn.Module) -> nn.Module:
    """Compile with all of torch.compile but its code generator.

    That one needs a C++ compiler, takes a minute, and computes in an order, and with dropout draws, of its own.
    """
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


@pytest.mark.slow  # test_compile.py compiles less every day
@pytest.mark.campaign
@pytest.mark.parametrize(("P", "strategy", "adapt"), [(1, "single", compiled_in_place), (2, "ddp", compiled)])
def test_a_compiled_model_trains_alike_while_K_changes(P: int, strategy: str, adapt: Adapt) -> None:
    plain, Ks = Causal(n_layer=1), [2, 1]  # one layer: each new shape is seconds of compiling
    reference, names = big_batches(plain, P, Ks), list(plain.build().state_dict())

    @on_processes(P, seconds=100)  # compiled in the children only: a process that has compiled should not be forked
    def results() -> Any:
        found = fit(Causal(adapt, n_layer=1), Ks, strategy)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1  # one for each kind of shape
        return found

    for found, saved in results:
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        assert saved == names  # without _orig_mod


class Mixture(nn.Module):
    """Sends each sample to the one expert that the router prefers; an expert without samples is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3, bias=False).double()
        self.experts = nn.ModuleList(nn.Linear(5, 1).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 1)
        for index, expert in enumerate(self.experts):
            if (rows := (chosen == index).nonzero().flatten()).numel():
                out = out.index_add(0, rows, gates[rows, None] * expert(x[rows]))
        return out


def test_experts_that_most_micro_batches_leave_out() -> None:
    samples, K = 21, 2  # each micro-batch of two leaves out one of three experts at least; no big batch does
    reference = big_batch_run(Regression(samples, model=Mixture), [in_order(samples, 2 * 2 * K)] * 3)

    @on_processes(2)
    def results() -> Tensor:
        strategy = DDPStrategy(find_unused_parameters=True)
        trainer = Trainer(strategy, micro_batch_size=2, accumulate_grad_batches=K, max_epochs=3, shuffle=False)
        trainer.fit(Regression(samples, model=Mixture))
        return parameters(trainer.model)

    for found in results:
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
