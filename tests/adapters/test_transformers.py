"""The ready tasks for `transformers`, beside one padded float64 forward written by hand."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import engine
from engine import Trainer
from engine.adapters import CausalLM, SequenceClassification
from tests.kit.processes import run
from tests.kit.reference import in_order, parameters

transformers = pytest.importorskip("transformers")

SAMPLES, N, K, LR, IGNORED = 20, 3, 2, 0.5, -100
VOCABULARY, PAD = 50, 0


def gpt2(**config: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD}
    drops = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    return transformers.GPT2Config(**(sizes | ends | drops | config))


def bert(**config: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": 12, "num_labels": 3}
    drops = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0)
    return transformers.BertConfig(**(sizes | limits | drops | config))


def samples(with_prompts: bool = False) -> list[dict[str, Any]]:
    """2 to 12 tokens each; in some the first half is a prompt, and one has nothing to be predicted."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 13, (SAMPLES,), generator=generator).tolist()
    found: list[dict[str, Any]] = [
        {"input_ids": torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths
    ]
    if with_prompts:
        for number, sample in enumerate(found):
            tokens = sample["input_ids"]
            prompt = len(tokens) if number == 4 else len(tokens) // 2 * (number % 2)
            sample["labels"] = [IGNORED] * prompt + tokens[prompt:]
    return found


def classes() -> list[dict[str, Any]]:
    labels = [IGNORED if number == 7 else number % 3 for number in range(SAMPLES)]
    return [{**sample, "labels": label} for sample, label in zip(samples(), labels, strict=True)]


class Plain:
    """What the ready tasks get here: float64 and plain SGD."""

    def configure_model(self) -> nn.Module:
        return super().configure_model().double()  # type: ignore[misc]

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=LR)


class PlainLM(Plain, CausalLM):
    pass


class PlainClassification(Plain, SequenceClassification):
    pass


def sums_of_tokens(model: Any, rows: list[Any]) -> tuple[Tensor, int]:
    """Each sequence by itself, without padding, token by token."""
    losses = []
    for row in rows:
        tokens, labels = row["input_ids"], row.get("labels", row["input_ids"])
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(1)
        losses += [-scores[place - 1, labels[place]] for place in range(1, len(tokens)) if labels[place] != IGNORED]
    return sum(losses), len(losses)  # type: ignore[return-value]


def sums_of_sequences(model: Any, rows: list[Any]) -> tuple[Tensor, int]:
    rows = [row for row in rows if row["labels"] != IGNORED]
    inputs = [torch.tensor(row["input_ids"]) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in inputs], True)
    scores = model(pad_sequence(inputs, True), attention_mask=mask).logits.log_softmax(1)
    return -sum(scores[i, row["labels"]] for i, row in enumerate(rows)), len(rows)  # type: ignore[return-value]


def big_batches(task: Any, P: int, sums: Any, rows: list[Any]) -> Tensor:
    """The reference: for each window ONE loss over all its samples, ONE gradient, plain SGD."""
    torch.manual_seed(0)
    model = task.configure_model()
    for window in in_order(SAMPLES, P * N * K) * 2:
        total, weight = sums(model, [rows[i] for i in window])
        gradients = torch.autograd.grad(total / weight, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= LR * g
    return parameters(model)


def fit(task: Any) -> tuple[Tensor, dict[str, float]]:
    trainer = Trainer("ddp", N, accumulate_grad_batches=K, max_epochs=2, shuffle=False)
    trainer.fit(task)
    return parameters(trainer.model), trainer.metrics


CASES = {
    "all tokens": lambda: (PlainLM(gpt2(), samples(), samples()), sums_of_tokens, samples()),
    "prompts": lambda: (PlainLM(gpt2(), samples(True), samples(True)), sums_of_tokens, samples(True)),
    "classes": lambda: (PlainClassification(bert(), classes(), classes()), sums_of_sequences, classes()),
    "classes by GPT-2": lambda: (
        PlainClassification(gpt2(num_labels=3), classes(), classes()),
        sums_of_sequences,
        classes(),
    ),
}


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_its_big_batch(case: str, P: int) -> None:
    task, sums, rows = CASES[case]()
    reference = big_batches(task, P, sums, rows)
    torch.manual_seed(0)
    model = task.configure_model()
    for found, metrics in run(P, fit, task):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        nn.utils.vector_to_parameters(found, model.parameters())
        total, weight = sums(model, rows)
        assert metrics["loss"] == pytest.approx((total / weight).item(), abs=1e-12)


def test_accuracy_is_of_the_labelled() -> None:
    model = transformers.BertForSequenceClassification(bert()).double().eval()
    task = SequenceClassification(model, classes())
    batch = task.collate(classes())
    right, count = task.evaluate(model, batch)["accuracy"]
    chosen = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(1)
    assert count == SAMPLES - 1
    assert right == sum(int(c == row["labels"]) for c, row in zip(chosen, classes(), strict=True))


def test_padding_that_is_there_already_is_not_predicted() -> None:
    task = CausalLM(gpt2(), [])
    batch = task.collate(
        [
            {"input_ids": [5, 6, PAD], "attention_mask": [1, 1, 0]},
            {"input_ids": [7, 8, 9, 5], "attention_mask": [1] * 4},
        ]
    )
    assert batch["labels"].tolist() == [[5, 6, IGNORED, IGNORED], [7, 8, 9, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_a_path_is_a_model_in_training_mode(tmp_path: Any) -> None:
    transformers.GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    model = CausalLM(str(tmp_path), samples()).configure_model()
    assert model.training
    assert isinstance(model, transformers.GPT2LMHeadModel)


def test_sixteen_bits_are_summed_in_thirty_two() -> None:
    model = transformers.GPT2LMHeadModel(gpt2()).bfloat16()
    task = CausalLM(model, samples())
    assert task.loss(model, task.collate(samples()[:N])).sum.dtype == torch.float32


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: SequenceClassification(bert(num_labels=1), classes()), "num_labels=1"),
        (lambda: SequenceClassification(bert(problem_type="multi_label_classification"), classes()), "multi_label"),
        (lambda: CausalLM(gpt2(output_router_logits=True), samples()), "output_router_logits=True"),
    ],
)
def test_another_loss_is_refused(task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer("single", N, max_epochs=1).fit(task())


def test_a_column_of_text_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="column 'text' holds str: expected numbers"):
        CausalLM(gpt2(), []).collate([{"input_ids": [1, 2], "text": "one"}])


@pytest.mark.parametrize("path", sorted((Path(engine.__file__).parent / "adapters").glob("*.py")), ids=lambda p: p.stem)
def test_nothing_is_imported_before_it_is_used(path: Path) -> None:
    body = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in body]
    assert not {name.split(".")[0] for name in names} & {"lightning", "pytorch_lightning", "transformers"}
