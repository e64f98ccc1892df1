"""A first look, with no download and no file: about two minutes on two cores.

A base of 0.8 million parameters is trained on generated tales (once; it is kept in a cache),
quantized to 4 bits, and fine-tuned on generated manuals, of which it has seen a few. (One that has
seen none is so sure of the wrong thing that the noise of 4 bits lowers its loss.)

  python -m experiments.run --config configs/quickstart.py
"""

from qlora_jax.config import defaults


def get_config():
  """The draft that `experiments.run` resolves."""
  config = defaults()
  config.name = "quickstart"

  config.pretrain.steps = 160
  config.pretrain.batch_size = 16
  config.pretrain.domain = "tales"
  config.pretrain.minor_domain = "manuals"
  config.pretrain.max_position_embeddings = 256

  config.model.dtype = "float32"  # a CPU has no fast bfloat16 products
  config.model.remat = "none"

  config.lora.rank = 8

  config.data.synthetic = "manuals"
  config.data.num_documents = 600
  config.data.tokenizer = "bytes"
  config.data.packing = True
  config.data.seq_len = 256

  config.optimizer.learning_rate = 2e-2
  config.optimizer.warmup_steps = 5

  config.train.steps = 100
  config.train.batch_size = 8
  config.train.log_every = 10
  config.train.eval_every = 50
  config.train.checkpoint_every = 50
  return config
