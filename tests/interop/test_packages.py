"""Models from packages that nobody here wrote, of tiny sizes and random weights.

Not part of the ordinary run: each is skipped where its package is not installed (the extra
`interop-test`; Python 3.12).
"""

import dataclasses
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as ql
from qlora_jax import QuantizationConfig, adapt, lora
from tests.interop import proof
from tests.interop.proof import TOKENS

ADAPT = {"quantize": {"*": QuantizationConfig()}, "key": jax.random.key(1)}
LORA = lora.LoRAConfig(rank=4, targets=("*",))


def test_gemma():
  """Google's gemma (Linen): weights in Einsum modules of its own, a tied table."""
  gm = pytest.importorskip("gemma.gm")
  config = gm.nn.config.TransformerConfig(
    num_embed=128,
    embed_dim=64,
    hidden_dim=128,
    num_heads=2,
    head_dim=64,
    num_kv_heads=1,
    final_logit_softcap=30.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=[gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL],
    sliding_window_size=8,
    use_qk_norm=True,
  )
  module = gm.nn.Transformer(config=config, dtype=jnp.float32)
  variables = jax.jit(module.init)(jax.random.key(0), TOKENS)
  adapted, frozen = proof.prove_linen(
    module,
    variables,
    (TOKENS,),
    lambda out: out.logits,
    proof.next_token_loss,
    adapters=LORA,
    **ADAPT,
  )
  assert adapted.function.tied == ("embedder/input_embedding",)
  assert len(proof.packed_leaves(frozen)) == 1 + 2 * 5


def test_the_readmes_gemma(monkeypatch):
  """The block as it stands, but for a smaller model of random weights."""
  gm = pytest.importorskip("gemma.gm")
  readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
  block = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "gemma" in b)
  module = gm.nn.Gemma3_270M(
    config=dataclasses.replace(
      gm.nn.Gemma3_270M.config,
      num_embed=128,
      attention_types=gm.nn.Gemma3_270M.config.attention_types[:1],
    )
  )
  monkeypatch.setattr(gm.nn, "Gemma3_270M", lambda: module)
  variables = jax.jit(module.init)(jax.random.key(0), TOKENS)
  monkeypatch.setattr(gm.ckpts, "load_params", lambda path: variables["params"])
  namespace = {"ql": ql, "linen": ql.linen, "lora": lora, "jax": jax, "tokens": TOKENS}
  exec(block, namespace)
  frozen, params = namespace["frozen"], namespace["params"]
  assert len(proof.packed_leaves(frozen)) == 5 and len(jax.tree.leaves(params)) == 2 * 3
  trees = {"frozen": frozen, "params": params, "constants": namespace["constants"]}
  ours = jax.jit(lambda trees: namespace["adapted"].apply(trees, TOKENS).logits)(trees)
  merged = namespace["adapted"].merge(trees)
  expected = jax.jit(lambda params: module.apply({"params": params}, TOKENS).logits)(merged)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=0.1 * np.abs(expected).max())


def test_tunix_qwen3():
  """google-tunix (NNX): Einsum modules of its own, whose Params have sharding metadata."""
  qwen3 = pytest.importorskip("tunix.models.qwen3.model")
  from flax import nnx as fnnx

  config = qwen3.ModelConfig(
    num_layers=2,
    vocab_size=128,
    embed_dim=64,
    hidden_dim=128,
    num_heads=2,
    head_dim=64,
    num_kv_heads=1,
    rope_theta=10_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
  )
  model = qwen3.Qwen3(config, rngs=fnnx.Rngs(0))
  # Its MLPs start as zeros, through which nothing trains.
  rngs = fnnx.Rngs(3)
  for _, mlp in fnnx.iter_modules(model):
    if isinstance(mlp, fnnx.Linear):
      mlp.kernel.set_value(0.1 * jax.random.normal(rngs.params(), mlp.kernel.shape))
  batch, time = TOKENS.shape
  positions = jnp.broadcast_to(jnp.arange(time), (batch, time))
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool)), (batch, time, time))
  adapted = proof.prove_nnx(
    model,
    (TOKENS, positions, None, mask),
    lambda out: out[0],
    proof.next_token_loss,
    adapters=LORA,
    **ADAPT,
  )
  assert adapted.function.tied == ("embedder/input_embedding",)


def flax_example(name: str):
  """A module of Flax's own examples, which its source distribution has and its wheel has not."""
  path = Path(os.environ.get("FLAX_EXAMPLES", "")) / name / "models.py"
  if not os.environ.get("FLAX_EXAMPLES") or not path.exists():
    pytest.skip("FLAX_EXAMPLES: the directory `examples` of Flax's source distribution")
  spec = importlib.util.spec_from_file_location(f"flax_example_{name}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def test_flax_example_lm1b():
  """Flax's own language model (Linen): MultiHeadDotProductAttention, Dense, Embed."""
  models = flax_example("lm1b")
  config = models.TransformerConfig(
    vocab_size=128,
    output_vocab_size=128,
    emb_dim=64,
    num_heads=2,
    num_layers=2,
    qkv_dim=64,
    mlp_dim=128,
    max_len=16,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    deterministic=True,
  )
  module = models.TransformerLM(config)
  variables = jax.jit(module.init)(jax.random.key(0), TOKENS)
  # Its embedding is looked up alone; the logits have a Dense of their own.
  proof.prove_linen(
    module,
    variables,
    (TOKENS,),
    lambda logits: logits,
    proof.next_token_loss,
    adapters=LORA,
    **ADAPT,
  )


def test_vision_transformer():
  """Kauldron's ViT (Linen): a convolution, which is left alone, and attention."""
  vit = pytest.importorskip("kauldron.modules.vit")

  encoder = vit.VitEncoder.from_spec(
    num_heads=2, hidden_size=64, num_layers=2, patch_size=4, mlp_size=128
  )
  module = vit.Vit(encoder=encoder, num_classes=64)
  images = jax.random.normal(jax.random.key(2), (4, 8, 8, 3))
  labels = jnp.arange(4)
  variables = jax.jit(module.init)(jax.random.key(0), images)
  # A head of zeros has no loss to lower but through itself.
  adapted, _ = proof.prove_linen(
    module,
    variables,
    (images,),
    lambda out: out["logits"],
    lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
    adapters=LORA,
    **ADAPT,
  )
  alone = {path: why for path, why in adapted.left_alone.items() if "patchifier" in path}
  assert set(alone.values()) == {"read by conv_general_dilated"}


def test_equinox():
  """A transformer of Equinox's own layers: a pytree of arrays, called example by example."""
  eqx = pytest.importorskip("equinox")

  class Block(eqx.Module):
    attention: Any
    mlp: Any
    norm: Any

    def __init__(self, key):
      keys = jax.random.split(key)
      self.attention = eqx.nn.MultiheadAttention(2, 64, key=keys[0])
      self.mlp = eqx.nn.MLP(64, 64, 128, 1, key=keys[1])
      self.norm = eqx.nn.LayerNorm(64)

    def __call__(self, x):
      mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
      x = x + self.attention(x, x, x, mask)
      return x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))

  class Model(eqx.Module):
    embed: Any
    blocks: list
    head: Any

    def __init__(self, key):
      keys = jax.random.split(key, 4)
      self.embed = eqx.nn.Embedding(128, 64, key=keys[0])
      self.blocks = [Block(key) for key in keys[1:3]]
      self.head = eqx.nn.Linear(64, 128, key=keys[3])

    def __call__(self, tokens):
      x = jax.vmap(self.embed)(tokens)
      for block in self.blocks:
        x = block(x)
      return jax.vmap(self.head)(x)

  weights, static = eqx.partition(Model(jax.random.key(0)), eqx.is_array)

  def function(weights, tokens):
    return jax.vmap(eqx.combine(weights, static))(tokens)

  adapted, frozen, params, constants = adapt(function, weights, TOKENS, adapters=LORA, **ADAPT)
  # A module of packed leaves is a module still.
  assert isinstance(frozen, Model) and frozen.blocks[0].mlp.layers[0].weight.shape == (64, 128)

  def trees(params, frozen):
    return {"frozen": frozen, "params": params, "constants": constants}

  proof.prove(
    adapted,
    weights,
    frozen,
    params,
    proof.adapted_paths(adapted, params),
    lambda params, frozen: adapted.apply(trees(params, frozen), TOKENS),
    lambda weights: function(weights, TOKENS),
    proof.next_token_loss,
    lambda params, frozen: adapted.merge(trees(params, frozen)),
  )


def test_easydel():
  """EasyDeL's Llama (NNX), called by keywords, under a mesh of its own.

  It pins JAX 0.9, and older tokenizers than ours: an environment of its own, its pins overridden,
  this project on the path. EASYDEL_AUTO=0 keeps it from setting flags that newer XLA refuses.
  """
  if os.environ.get("EASYDEL_AUTO") != "0":
    pytest.skip("EASYDEL_AUTO=0: else EasyDeL sets flags that end the process")
  llama = pytest.importorskip("easydel.modules.llama")
  from flax import nnx as fnnx

  config = llama.LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=64,
    sharding_axis_dims=(1, 1, -1, 1, 1),
    attn_mechanism="vanilla",
    attn_dtype=jnp.float32,
  )
  model = llama.LlamaForCausalLM(
    config, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=fnnx.Rngs(0)
  )
  with model.mesh:
    proof.prove_nnx(
      model, (TOKENS,), lambda out: out.logits, proof.next_token_loss, adapters=LORA, **ADAPT
    )


@pytest.mark.parametrize("adapt_model", ["by_qwix", "by_ours"])
def test_the_comparison_with_qwix(adapt_model):
  """The benchmark runs, and the adapters train."""
  pytest.importorskip("qwix")
  pytest.importorskip("tunix.models.llama3.model")
  from experiments.bench import importing as benchmark

  row = benchmark.measure(getattr(benchmark, adapt_model))
  assert row["trained_leaves"] == 2 * 7 * 4
  assert row["loss_last"] < 0.98 * row["loss_first"]
