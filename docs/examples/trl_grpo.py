"""Reinforcement learning with TRL's GRPOTrainer and backend="liger".

TRL generates completions with the same model, which is compiled in place: also the graphs of generation are ours. TRL
1.x computes head and loss by an operator of its own, outside the compiled graph.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

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
    pad_token_id=0,
    eos_token_id=1,
)
model = LlamaForCausalLM(config)
model.compile(backend="liger")


def reward(completions, **_):
    return [float(completion.count("cat")) for completion in completions]


with tempfile.TemporaryDirectory() as folder:
    arguments = GRPOConfig(
        output_dir=folder,
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
    )
    dataset = Dataset.from_dict({"prompt": ["the cat sat", "a dog ran"] * 6})
    GRPOTrainer(model, reward, arguments, train_dataset=dataset, processing_class=tokenizer).train()

print(
    max(liger_compile.reports(), key=lambda report: report.count("replace"))
)  # others are of generation and of TRL
