"""`MoECausalLM`: the routers' balance loss is that of one batch over the window, whatever K and P are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine import Trainer
from engine.adapters import CausalLM, MoECausalLM
from tests.kit.processes import on_processes
from tests.kit.reference import Watch, parameters

transformers = pytest.importorskip("transformers")

SAMPLES, N, LR, VOCABULARY = 14, 2, 0.3, 30


def config(**options: Any) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    ends = {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 16}
    return transformers.MixtralConfig(**(sizes | experts | ends | options))


class Mixture(MoECausalLM):
    def configure_model(self) -> nn.Module:
        model = super().configure_model()
        model.set_experts_implementation("eager")  # type: ignore[operator]  # the grouped product takes no float64
        return model.double()

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=LR)


def texts() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(1, VOCABULARY, (2 + i % 7,), generator=generator)} for i in range(SAMPLES)]


def reference(window: int) -> Any:
    """One padded batch a window. The balance is written by hand: transformers sums it in float32."""
    torch.manual_seed(0)
    task = Mixture(config(), texts())
    model, records = task.configure_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for start in range(0, SAMPLES, window):
        batch = task.collate(texts()[start : start + window])
        found = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
        cross_entropy = nn.functional.cross_entropy(
            found.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )
        attended = batch["attention_mask"].flatten().bool()
        chances = torch.cat([layer[attended] for layer in found.router_logits]).softmax(1)
        chosen = nn.functional.one_hot(chances.topk(2).indices, 4).sum(1).double()
        balance = 4 * (chances.mean(0) * chosen.mean(0)).sum()
        assert balance.item() == pytest.approx(found.aux_loss.item(), rel=1e-5)
        optimizer.zero_grad()
        (loss := cross_entropy + 0.5 * balance).backward()
        optimizer.step()
        records.append({"loss": loss.item(), "balance": balance.item(), "cross_entropy": cross_entropy.item()})
    return parameters(model), records


@pytest.mark.parametrize(("P", "K"), [(1, 1), (1, 3), (2, 2)])
def test_the_balance_is_that_of_the_window(P: int, K: int) -> None:
    wanted, records = reference(P * K * N)

    @on_processes(P)
    def results() -> Any:
        watch = Watch()
        options = {"accumulate_grad_batches": K, "max_epochs": 1, "shuffle": False, "callbacks": watch}
        trainer = Trainer("ddp", N, **options)
        trainer.fit(task := Mixture(config(), texts(), texts()[:4]))
        metrics = trainer.validate(task)
        return parameters(trainer.model), watch.records, metrics

    for found, seen, metrics in results:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        assert [{name: record[name] for name in records[0]} for record in seen] == [
            {name: pytest.approx(value, rel=1e-12) for name, value in record.items()} for record in records
        ]
        assert metrics.keys() == {"loss"}


def test_models_of_the_other_kind_are_refused() -> None:
    dense = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match=r"model=GPT2Config: expected router_aux_loss_coef .* Use CausalLM"):
        Trainer("single", N, max_epochs=1).fit(MoECausalLM(dense, texts()))
    with pytest.raises(ValueError, match=r"output_router_logits=True: .*Use MoECausalLM, or False"):
        Trainer("single", N, max_epochs=1).fit(CausalLM(config(output_router_logits=True), texts()))
