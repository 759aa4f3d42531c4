"""By name: `TrainingArguments(torch_compile=True)` with backend="liger", through `use_for_inductor`.

transformers and accelerate accept only the backends of a fixed list. `use_for_inductor` makes torch.compile use
backend="liger" where they ask for "inductor". The environment variable LIGER_COMPILE_FOR_INDUCTOR=1 does the same for a
program that you cannot edit. In a script, one line at its beginning is enough: `liger_compile.use_for_inductor()`.
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
rows = torch.randint(config.vocab_size, (16, 64))
dataset = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]

with tempfile.TemporaryDirectory() as folder, liger_compile.use_for_inductor():
    arguments = TrainingArguments(
        output_dir=folder,
        torch_compile=True,  # the Trainer calls torch.compile in train(), not before
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=dataset).train()

print(liger_compile.reports()[-1])
