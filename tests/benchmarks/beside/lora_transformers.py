import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Trainer,
    TrainingArguments,
)

from tests.benchmarks.beside.common import PADDING, TOKENS, padded


def collated(samples):
    texts = padded([torch.tensor(sample["input_ids"]) for sample in samples])
    return {"input_ids": texts.clamp(min=0), "labels": texts, "attention_mask": (texts != PADDING).long()}


torch.manual_seed(0)
config = GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4))
sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "save_steps": 2}
arguments = TrainingArguments("hf", learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, **sizes)
trainer = Trainer(model, arguments, data_collator=collated, train_dataset=TOKENS)
trainer.train()
trainer.save_model("hf/pretrained")
result = "hf/pretrained"
