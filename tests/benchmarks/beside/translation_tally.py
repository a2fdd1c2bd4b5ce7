import torch
from transformers import BartConfig

from engine import Trainer
from engine.adapters import Seq2SeqLM

sizes = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
config = BartConfig(vocab_size=64, max_position_embeddings=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
texts = [[3 + (start + i) % 9 for i in range(4 + start % 7)] for start in range(60)]
pairs = [{"input_ids": text, "labels": [*reversed(text), config.eos_token_id]} for text in texts]

trainer = Trainer(micro_batch_size=4, effective_batch_size=16, max_epochs=2)
trainer.fit(Seq2SeqLM(config, pairs[10:], validation=pairs[:10], lr=1e-2))
result = torch.tensor(trainer.metrics["loss"])
