"""`SavePretrained`: the trained model goes back into its own library, also if only what is trained is saved."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

from engine import Trainer
from engine.adapters import CausalLM
from engine.callbacks import EMA, SavePretrained
from tests.kit.processes import run
from tests.kit.reference import Regression

CONFIG = GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
TEXTS = [{"input_ids": [*range(1, 3 + start % 5)]} for start in range(16)]


class Frozen(CausalLM):
    """Trains the norms of a frozen GPT-2, or an adapter of `peft`."""

    def __init__(self, peft: bool) -> None:
        super().__init__(CONFIG, TEXTS, lr=0.1)
        self.peft = peft

    def configure_model(self) -> Any:
        model: Any = AutoModelForCausalLM.from_config(CONFIG)
        if self.peft:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=2))
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("ln" in name)
        self.source = model
        return super().configure_model()


def fit(strategy: str, folder: str, peft: bool, updates: int | None) -> Any:
    options: dict[str, Any] = {"micro_batch_size": 2, "effective_batch_size": 4, "max_epochs": 2}
    callbacks = [SavePretrained()] if strategy == "fsdp" else [SavePretrained(), EMA(0.5)]
    trainer = Trainer(strategy, run_dir=folder, save_frozen=False, callbacks=callbacks, max_updates=updates, **options)
    trainer.fit(Frozen(peft))
    return trainer.update


def loaded(folder: Path, peft: bool) -> Any:
    if not peft:
        return AutoModelForCausalLM.from_pretrained(folder)
    from peft import PeftModel

    torch.manual_seed(0)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_config(CONFIG), folder)


@pytest.mark.parametrize(("strategy", "P"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
@pytest.mark.parametrize("peft", [False, True])
def test_it_loads_as_the_model_that_was_trained(peft: bool, strategy: str, P: int, tmp_path: Path) -> None:
    if peft and find_spec("peft") is None:
        pytest.skip("peft is not installed")
    for updates in (3, None):
        assert run(P, fit, strategy, str(tmp_path / "run"), peft, updates) == [updates or 8] * P
    trained = load_file(tmp_path / "run/model.safetensors")
    assert all(("lora" in name) if peft else ("ln" in name) for name in trained)
    found = loaded(tmp_path / "run/pretrained", peft).state_dict()
    for name, value in trained.items():
        assert torch.equal(found[name], value)


def test_it_needs_a_model_that_can_and_a_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {"micro_batch_size": 2, "max_updates": 1, "callbacks": SavePretrained()}
    with pytest.raises(ValueError, match=r"a model with save_pretrained\(\), and a run_dir, found a Sequential"):
        Trainer(run_dir=str(tmp_path), **options).fit(Regression(4))
    with pytest.raises(ValueError, match=r"found a GPT2LMHeadModel and run_dir=None"):
        Trainer(**options).fit(CausalLM(CONFIG, TEXTS))
