import torch
from transformers import BartConfig, BartForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments

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


def collate(samples):
    columns = {name: [torch.tensor(sample[name]) for sample in samples] for name in ("input_ids", "labels")}
    columns["attention_mask"] = [torch.ones_like(row) for row in columns["input_ids"]]
    fills = {"input_ids": config.pad_token_id, "labels": -100, "attention_mask": 0}
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad(rows, batch_first=True, padding_value=fills[name]) for name, rows in columns.items()}


arguments = Seq2SeqTrainingArguments(
    output_dir="translation",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    num_train_epochs=2,
    learning_rate=1e-2,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
)
trainer = Seq2SeqTrainer(
    model=BartForConditionalGeneration(config),
    args=arguments,
    train_dataset=pairs[10:],
    eval_dataset=pairs[:10],
    data_collator=collate,
)
trainer.train()
result = torch.tensor(trainer.evaluate()["eval_loss"])
