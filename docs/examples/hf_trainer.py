"""Hugging Face's Trainer with backend="liger".

`TrainingArguments(torch_compile_backend=...)` accepts only the backends of a fixed list. So the model is compiled in
place, by `model.compile`, before the Trainer gets it.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import liger_compile

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    use_cache=False,  # training reads no cache of keys and values
)
model = LlamaForCausalLM(config)
model.compile(backend="liger")

rows = torch.randint(config.vocab_size, (16, 64))
dataset = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=dataset).train()

print(liger_compile.reports()[-1])
