from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from engine import Trainer
from engine.adapters import CausalLM
from engine.callbacks import SavePretrained
from tests.benchmarks.beside.common import TOKENS


class Adapted(CausalLM):
    def configure_model(self):
        self.source = get_peft_model(AutoModelForCausalLM.from_config(self.source), LoraConfig(r=4))
        return super().configure_model()


config = GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
options = {"micro_batch_size": 4, "accumulate_grad_batches": 2, "max_epochs": 1, "save_every_n_updates": 2}
trainer = Trainer(run_dir="lora", save_frozen=False, callbacks=SavePretrained(), **options)
trainer.fit(Adapted(config, TOKENS, lr=1e-2))
result = "lora/pretrained"
