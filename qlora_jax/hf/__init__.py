"""Hugging Face's files: checkpoints, PEFT adapters, tokenizers."""

from qlora_jax.hf.chat import load_chat_template as load_chat_template
from qlora_jax.hf.checkpoint import initialize as initialize
from qlora_jax.hf.checkpoint import load as load
from qlora_jax.hf.checkpoint import open_stored as open_stored
from qlora_jax.hf.packed import save_base as save_base
from qlora_jax.hf.peft import load_adapter as load_adapter
from qlora_jax.hf.peft import save_adapter as save_adapter
from qlora_jax.hf.saving import save as save
from qlora_jax.hf.saving import save_bitsandbytes as save_bitsandbytes
from qlora_jax.hf.saving import save_merged as save_merged
from qlora_jax.hf.tokenizers import load_tokenizer as load_tokenizer
