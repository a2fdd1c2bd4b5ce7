"""The ready tasks for `transformers`, beside one padded float64 forward written by hand."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import engine
from engine import Trainer
from engine.adapters import CausalLM, MaskedLM, Seq2SeqLM, SequenceClassification
from tests.kit.processes import ChildError, on_processes, run
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


def bart(**config: Any) -> Any:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    marks = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    drops = dict.fromkeys(["dropout", "attention_dropout", "activation_dropout"], 0.0)
    return transformers.BartConfig(**(sizes | heads | marks | drops | {"decoder_start_token_id": 2} | config))


def m2m(**config: Any) -> Any:
    """A model whose shift of the labels only its own forward knows."""
    given = {k: v for k, v in bart().to_dict().items() if k not in ("model_type", "architectures")}
    return transformers.M2M100Config(**(given | config))


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


def masked() -> list[dict[str, Any]]:
    """Every third token masked; in one sample none."""
    found = []
    for number, sample in enumerate(samples()):
        tokens = sample["input_ids"]
        chosen = [number != 4 and (place + number) % 3 == 0 for place in range(len(tokens))]
        labels = [token if is_chosen else IGNORED for token, is_chosen in zip(tokens, chosen, strict=True)]
        inputs = [1 if is_chosen else token for token, is_chosen in zip(tokens, chosen, strict=True)]
        found.append({"input_ids": inputs, "labels": labels})
    return found


def pairs() -> list[dict[str, Any]]:
    """A source, and a target of another length; in one target the first two tokens are not predicted."""
    sources = [sample["input_ids"] for sample in samples()]
    targets = [[*source[::-2], 2] for source in sources]
    targets[4] = [IGNORED, IGNORED, 7, 2]
    return [{"input_ids": a, "labels": b} for a, b in zip(sources, targets, strict=True)]


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


class PlainMasked(Plain, MaskedLM):
    pass


class PlainSeq2Seq(Plain, Seq2SeqLM):
    pass


def sums_of_masked(model: Any, rows: list[Any]) -> tuple[Tensor, int]:
    losses = []
    for row in rows:
        scores = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(1)
        losses += [-scores[place, label] for place, label in enumerate(row["labels"]) if label != IGNORED]
    return sum(losses), len(losses)  # type: ignore[return-value]


def sums_of_targets(model: Any, rows: list[Any]) -> tuple[Tensor, int]:
    """Each pair by itself, without padding, token by token; the decoder reads the start mark and all but the last."""
    losses, config = [], model.config
    for row in rows:
        labels = row["labels"]
        read = [config.decoder_start_token_id, *(config.pad_token_id if t == IGNORED else t for t in labels[:-1])]
        output = model(torch.tensor([row["input_ids"]]), decoder_input_ids=torch.tensor([read]))
        scores = output.logits[0].log_softmax(1)
        losses += [-scores[place, label] for place, label in enumerate(labels) if label != IGNORED]
    return sum(losses), len(losses)  # type: ignore[return-value]


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


CASES = {
    "all tokens": lambda: (PlainLM(gpt2(), samples(), samples()), sums_of_tokens, samples()),
    "prompts": lambda: (PlainLM(gpt2(), samples(True), samples(True)), sums_of_tokens, samples(True)),
    "masked": lambda: (PlainMasked(bert(), masked(), masked()), sums_of_masked, masked()),
    "pairs": lambda: (PlainSeq2Seq(bart(), pairs(), pairs()), sums_of_targets, pairs()),
    "pairs shifted by the model": lambda: (PlainSeq2Seq(m2m(), pairs(), pairs()), sums_of_targets, pairs()),
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

    @on_processes(P)
    def results() -> tuple[Tensor, dict[str, float]]:
        trainer = Trainer("ddp", N, accumulate_grad_batches=K, max_epochs=2, shuffle=False)
        trainer.fit(task)
        return parameters(trainer.model), trainer.metrics

    for found, metrics in results:
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        nn.utils.vector_to_parameters(found, model.parameters())
        total, weight = sums(model, rows)
        assert metrics["loss"] == pytest.approx((total / weight).item(), abs=1e-12)


def test_masks_are_drawn_by_place_whatever_P_is_and_again_in_each_epoch() -> None:
    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    model = pytest.importorskip("tokenizers").models.WordLevel(words, unk_token="[UNK]")
    marks = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    raw = pytest.importorskip("tokenizers").Tokenizer(model)
    collator = transformers.DataCollatorForLanguageModeling(
        transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    )
    seen = []

    class Watched(PlainMasked):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            seen.append(tuple(map(tuple, batch["labels"].tolist())))
            return super().loss(model, batch)

    def trained(K: int) -> tuple[Tensor, list[Any]]:
        trainer = Trainer("ddp", N, accumulate_grad_batches=K, max_epochs=2, shuffle=False)
        trainer.fit(Watched(bert(), samples(), collator=collator))
        return parameters(trainer.model), seen

    (one, all_seen), *others = run(1, trained, 2 * K) + run(2, trained, K)
    for parameters_of_two, _ in others:
        torch.testing.assert_close(parameters_of_two, one, rtol=0, atol=1e-12)
    assert sorted(all_seen) == sorted(others[0][1] + others[1][1])
    half = len(all_seen) // 2
    assert all_seen[:half] != all_seen[half:]


def test_labels_equal_the_loss_that_the_model_itself_gives() -> None:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)  # its norms are in float32, whatever the model is
    task = Seq2SeqLM(model, pairs())
    batch = task.collate(pairs())
    total, weight = task.loss(model, batch)
    torch.testing.assert_close(total / weight, model(**batch).loss, rtol=1e-6, atol=1e-6)


def test_decoder_inputs_that_are_given_are_used_and_padded_as_tokens() -> None:
    model = transformers.BartForConditionalGeneration(bart()).double()
    task = Seq2SeqLM(model, [])
    task.configure_model()
    read = [[2, *(1 if t == IGNORED else t for t in row["labels"][:-1])] for row in pairs()]
    given = task.collate([{**row, "decoder_input_ids": x} for row, x in zip(pairs(), read, strict=True)])
    assert given["decoder_input_ids"][2].tolist() == [2, 34, 1, 1, 1, 1, 1]
    shifted = task.loss(model, task.collate(pairs())).sum
    torch.testing.assert_close(task.loss(model, given).sum, shifted, rtol=0, atol=1e-12)


def unlabelled(rows: list[dict[str, Any]], places: range) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"]} if i in places else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Seq2SeqLM(bart(), unlabelled(pairs(), range(20))), "Seq2SeqLM expected labels: the target's tokens"),
        (lambda: MaskedLM(bert(), samples()), "MaskedLM expected labels: use collator=.*LanguageModeling"),
        (lambda: SequenceClassification(bert(), samples()), "SequenceClassification expected labels: one whole"),
        (lambda: Seq2SeqLM(bart(), unlabelled(pairs(), range(1, 2))), r"\['input_ids'.*expected the same columns"),
    ],
)
def test_a_micro_batch_without_labels_is_refused_on_all_processes(make: Any, message: str) -> None:
    with pytest.raises(ChildError) as raised:
        run(2, lambda: Trainer("ddp", N, max_epochs=1, shuffle=False).fit(make()))
    assert re.search(message, raised.value.errors[0])
    assert set(raised.value.errors) == {0, 1}


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
