"""Preference tuning with TRL's DPOTrainer and backend="liger".

TRL 1.x computes head and loss by an operator of its own, outside the compiled graph. The backend replaces what is
inside the layers.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import liger_compile

torch.manual_seed(0)
words = ["<pad>", "<eos>", "the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree"]
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")

config = LlamaConfig(
    vocab_size=len(words),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    use_cache=False,  # training reads no cache of keys and values
    pad_token_id=0,
    eos_token_id=1,
)
model, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
reference.load_state_dict(model.state_dict())
model.compile(backend="liger")

pairs = {"prompt": "the cat sat", "chosen": " on the mat", "rejected": " under a tree"}
dataset = Dataset.from_list([pairs] * 12)

with tempfile.TemporaryDirectory() as folder:
    arguments = DPOConfig(
        output_dir=folder,
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
    )
    DPOTrainer(model, reference, arguments, train_dataset=dataset, processing_class=tokenizer).train()

print(max(liger_compile.reports(), key=lambda report: len(report.sites)))  # the others are TRL's own graphs
