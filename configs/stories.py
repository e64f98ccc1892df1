"""A real Llama checkpoint on real text: stories260K, fine-tuned on Shakespeare, on two cores.

  python -m experiments.run --config configs/stories.py \
    --config.model.path=../shared/data/models/stories260K \
    --config.data.path=../shared/data/corpora/tinyshakespeare.txt

The last tenth of the text is held out. Any Hugging Face Llama directory and any text will do.
"""

from qlora_jax.config import defaults


def get_config():
  """The draft that `experiments.run` resolves."""
  config = defaults()
  config.name = "stories"

  config.model.path = "../shared/data/models/stories260K"
  config.model.dtype = "float32"  # a CPU has no fast bfloat16 products
  config.model.remat = "none"

  config.lora.rank = 8

  config.data.path = "../shared/data/corpora/tinyshakespeare.txt"
  config.data.seq_len = 512

  config.optimizer.learning_rate = 7e-3
  config.optimizer.warmup_steps = 20

  config.train.steps = 800
  config.train.batch_size = 2
  config.train.log_every = 100
  config.train.eval_every = 400
  config.train.eval_batch_size = 17
  config.train.checkpoint_every = 200
  return config
