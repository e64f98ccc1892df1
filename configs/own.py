"""A base of our own: 28 million parameters, trained on real text with a tokenizer of its own.

A Llama of 8 layers of 512, on 138 books in the public domain and 15,262 pages of technical
documentation (Microsoft, CC BY 4.0), 129 MB of text in all, of which the last hundredth of each is
held out. A byte-level BPE of 8,192 tokens is trained on the same text first. Each text is seen at
most four times.

  python -m experiments.base --config configs/own.py --workdir runs/own_base

It is meant for a GPU: 144 s on one H100, 31 more to encode the text (JAX 0.11.2), to a held-out
loss of 1.750 nats a token. The base is in runs/own_base/model, bfloat16, in files of at most 16
MiB; configs/ablate_own.py is the ablation on it. This config's own run fine-tunes it on another
kind of text, Wikipedia's articles.
"""

from qlora_jax.config import defaults

CORPORA = "../shared/data/corpora"


def get_config():
  """The draft that `experiments.base` takes its `pretrain` from, and `experiments.run` resolves."""
  config = defaults()
  config.name = "own"

  config.pretrain.paths = (f"{CORPORA}/classic_books.jsonl.zst", f"{CORPORA}/msdocs.jsonl.zst")
  config.pretrain.steps = 4000
  config.pretrain.batch_size = 64
  config.pretrain.learning_rate = 2e-3
  config.pretrain.warmup_steps = 200
  config.pretrain.weight_decay = 0.1
  config.pretrain.dtype = "bfloat16"
  config.pretrain.vocab_size = 8192
  config.pretrain.hidden_size = 512
  config.pretrain.intermediate_size = 1536
  config.pretrain.num_layers = 8
  config.pretrain.num_heads = 8
  config.pretrain.num_kv_heads = 2
  config.pretrain.max_position_embeddings = 512

  config.data.path = f"{CORPORA}/wikitext-2/test.txt"
  config.data.seq_len = 256

  config.lora.rank = 8
  config.optimizer.learning_rate = 4e-3
  config.optimizer.warmup_steps = 20
  config.train.steps = 200
  config.train.batch_size = 8
  config.train.log_every = 50
  config.train.eval_every = 200
  config.train.checkpoint_every = 200
  config.train.eval_batch_size = 64
  config.train.loss_chunk = 4096
  return config
