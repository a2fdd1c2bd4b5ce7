"""Models of Hugging Face's `transformers` as tasks, weighted by the number of predictions."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from engine.errors import UserError
from engine.loss import Loss
from engine.losses import load_balance
from engine.task import Task
from engine.window_task import Added, Output, WindowTask

IGNORED = -100  # the label of what is not predicted, as everywhere in `transformers`
TOKENS = ("input_ids", "decoder_input_ids")


class _Pretrained(Task):
    """One model of `transformers` and its tokenised data; `collator` replaces the padding of `collate`."""

    auto_class: str
    labels = "the tokens to predict, with -100 for what is not predicted"

    def __init__(
        self,
        model: Any,
        dataset: Dataset[Any] | Iterable[Any],
        validation: Dataset[Any] | Iterable[Any] | None = None,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        collator: Callable[[list[Any]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.source = model
        self.dataset, self.validation = dataset, validation
        self.lr, self.weight_decay, self.collator = lr, weight_decay, collator
        self._pad = 0

    def configure_model(self) -> nn.Module:
        model: Any = self.source
        if not isinstance(model, nn.Module):
            auto = getattr(import_module("transformers"), self.auto_class)
            model = (auto.from_pretrained if isinstance(model, str) else auto.from_config)(model)
        self.check(model.config)
        self._pad = getattr(model.config, "pad_token_id", None) or 0
        return model.train()  # type: ignore[no-any-return]

    def check(self, config: Any) -> None:
        """Raise UserError for a model that needs another loss."""
        if getattr(config, "output_router_logits", False):
            way_out = "Use MoECausalLM, or False."
            raise UserError(f"output_router_logits=True: expected a model without a loss of its router. {way_out}")

    def without_labels(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's arguments and the labels of a micro-batch. Raises UserError if it has no labels."""
        if "labels" not in batch:
            what = f"a micro-batch of {', '.join(batch)}"
            raise UserError(f"{what}: {type(self).__name__} expected labels: {self.labels}.")
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]

    def configure_optimizer(self, model: nn.Module) -> Optimizer | tuple[Optimizer, LRScheduler]:
        return AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        inputs, labels = self.without_labels(batch)
        return _cross_entropy(model(**inputs).logits, labels)

    def train_data(self) -> Dataset[Any] | Iterable[Any]:
        return self.dataset

    def validation_data(self) -> Dataset[Any] | Iterable[Any] | None:
        return self.validation

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        """Pad on the right: labels with -100, tokens with the model's padding, else 0.

        It makes an `attention_mask` if none is given. Raises UserError for a column that is not numeric, and for
        samples with different columns.
        """
        if self.collator is not None:
            return dict(self.collator(samples))
        for sample in samples:
            if sample.keys() != samples[0].keys():
                what = f"samples of one micro-batch have {sorted(sample)} and {sorted(samples[0])}"
                raise UserError(f"{what}: expected the same columns. Give labels to all samples, or to none.")
        if "attention_mask" not in samples[0]:
            samples = [{**sample, "attention_mask": [1] * len(sample["input_ids"])} for sample in samples]
        return {name: self._column(name, [sample[name] for sample in samples]) for name in samples[0]}

    def _column(self, name: str, values: list[Any]) -> Tensor:
        try:
            tensors = [torch.as_tensor(value) for value in values]
        except (TypeError, ValueError, RuntimeError):
            what = f"column {name!r} holds {type(values[0]).__name__}"
            raise UserError(f"{what}: expected numbers. Use dataset.remove_columns({name!r}).") from None
        if not tensors[0].ndim:
            return torch.stack(tensors)
        return pad_sequence(tensors, True, IGNORED if name == "labels" else self._pad if name in TOKENS else 0)


class CausalLM(_Pretrained):
    """Predicts each next token, with AdamW; an update's gradient is the mean over all predicted tokens of its window.

    `model` is a causal language model, its config (random parameters, from the run's seed), or a name or path for
    `AutoModelForCausalLM.from_pretrained`. Samples are dictionaries of token numbers, of any length: `input_ids`, and
    `labels` (the same positions, not shifted; -100: not predicted) if not all of them are predicted.
    """

    auto_class = "AutoModelForCausalLM"

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        """Pad to the longest sample; padding is neither attended to nor predicted."""
        if self.collator is None:
            samples = [s if "labels" in s else {**s, "labels": _predicted(s)} for s in samples]
        return super().collate(samples)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        return self._predict(model, batch)[1]

    def _predict(self, model: nn.Module, batch: Any, **options: Any) -> tuple[Any, Loss]:
        inputs, labels = self.without_labels(batch)
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # a slice of logits would be copied
        found = model(**inputs, use_cache=False, **options)
        return found, _cross_entropy(found.logits, labels)


class MoECausalLM(CausalLM, WindowTask):  # type: ignore[misc]  # of the loss of one micro-batch
    """CausalLM for a mixture of experts, with the balance loss of its routers, both over the window of all processes.

    The balance loss (arXiv:2101.03961, equations 4 to 6) is over all layers and attended tokens, times the config's
    `router_aux_loss_coef`. Each window runs twice: see `WindowTask`. Validation reports the cross-entropy as `loss`.
    """

    def check(self, config: Any) -> None:
        coefficient, experts = (getattr(config, name, None) for name in ("router_aux_loss_coef", "num_experts_per_tok"))
        if coefficient is None or experts is None:
            what = "expected router_aux_loss_coef and num_experts_per_tok in its config"
            raise UserError(f"model={type(config).__name__}: {what}. Use CausalLM for one without routers.")
        self._coefficient, self._experts_per_token = float(coefficient), int(experts)

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, Output]:
        found, (total, predicted) = self._predict(model, batch, output_router_logits=True)
        logits = torch.stack(found.router_logits)
        chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).reshape(-1, 1)
        chosen = torch.zeros_like(chances).scatter(-1, chances.topk(self._experts_per_token).indices, 1.0)
        sums = {"chosen": (chosen * mask).sum((0, 1)), "chances": (chances * mask).sum((0, 1))}
        counts = {"predicted": predicted, "routed": mask.sum() * len(logits)}
        return {name: Added(tensor) for name, tensor in {"total": total, **sums, **counts}.items()}

    def window_loss(self, outputs: Mapping[str, Tensor]) -> Tensor:
        balance = load_balance(outputs["chances"], outputs["chosen"], outputs["routed"])
        cross_entropy = outputs["total"] / outputs["predicted"].clamp(min=1)
        self.log("balance", balance)
        self.log("cross_entropy", cross_entropy)
        return cross_entropy + self._coefficient * balance


class MaskedLM(_Pretrained):
    """Predicts the masked tokens, with AdamW; an update's gradient is the mean over all of them in its window.

    `model` is a masked language model, its config, or a name or path for `AutoModelForMaskedLM.from_pretrained`.
    `collator=transformers.DataCollatorForLanguageModeling(tokenizer)` masks each sample again in each epoch. Without
    it, samples are masked already: `input_ids`, and `labels` with -100 where nothing is predicted.
    """

    auto_class = "AutoModelForMaskedLM"
    labels = "use collator=transformers.DataCollatorForLanguageModeling(tokenizer), or mask the samples yourself"


class Seq2SeqLM(_Pretrained):
    """Predicts one sequence from another, with AdamW; an update's gradient is the mean over all predicted tokens.

    `model` is an encoder and decoder, its config, or a name or path for `AutoModelForSeq2SeqLM.from_pretrained`.
    Samples are dictionaries of `input_ids` (the source) and `labels` (the target, not shifted; -100: not predicted),
    each of any length. The decoder reads the labels shifted by one, or `decoder_input_ids` if given.
    """

    auto_class = "AutoModelForSeq2SeqLM"
    labels = "the target's tokens, as of tokenizer(source, text_target=target)"

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        inputs, labels = self.without_labels(batch)
        shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shifted is None:
            inputs["labels"] = labels  # such a model shifts them itself
        elif "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shifted(labels)
        return _cross_entropy(model(**inputs, use_cache=False).logits, labels)


class SequenceClassification(_Pretrained):
    """Gives each sequence one of several labels, with AdamW; validation means are `loss` and `accuracy`.

    `model` is a model for sequence classification, its config, or a name or path for
    `AutoModelForSequenceClassification.from_pretrained`. Samples are dictionaries of `input_ids` and `labels`, one
    whole number (-100: no label). Raises UserError for regression and several labels at a time.
    """

    auto_class = "AutoModelForSequenceClassification"
    labels = "one whole number for each sample"

    def check(self, config: Any) -> None:
        super().check(config)
        if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
            what = f"num_labels={config.num_labels}, problem_type={config.problem_type!r}"
            raise UserError(f"{what}: expected one of several labels. Override loss() for others.")

    def evaluate(self, model: nn.Module, batch: Any) -> Mapping[str, Loss | Tensor]:
        inputs, labels = self.without_labels(batch)
        logits = model(**inputs).logits
        loss = _cross_entropy(logits, labels)
        return {"loss": loss, "accuracy": Loss((logits.argmax(1) == labels).sum(), loss.weight)}


def _predicted(sample: Mapping[str, Any]) -> Tensor:
    """Return the tokens as labels, and -100 if the sample's own mask is 0, which is padding."""
    tokens = torch.as_tensor(sample["input_ids"])
    mask = sample.get("attention_mask")
    return tokens if mask is None else tokens.masked_fill(torch.as_tensor(mask) == 0, IGNORED)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Loss:
    """Sum in float32 or wider over all labels but -100; `logits` has a row for each label."""
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(total, (labels != IGNORED).sum())
