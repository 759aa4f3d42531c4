"""Lightning with backend="liger": the model is compiled in `configure_model`, and the loss is computed inside of it."""

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import liger_compile


class Llama(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_cache=False,  # training reads no cache of keys and values
        )
        self.model = LlamaForCausalLM(config)

    def configure_model(self):
        self.model.compile(backend="liger")

    def training_step(self, tokens):
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


torch.manual_seed(0)
model = Llama()
trainer = lightning.Trainer(
    max_steps=3,
    accelerator="auto",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(torch.randint(512, (12, 64)), batch_size=4))

print(liger_compile.reports()[-1])
