import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import dequantize, lora, quantize, quantize_tree, tree_paths
from qlora_jax.lora import LoRAConfig
from qlora_jax.quantization import QuantizationConfig

L, D, F = 3, 16, 24


def base():
  """Two stacked projections, a bias, a norm, a table and an unstacked head."""

  def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)

  return {
    "embed": {"embedding": normal(0, 40, D)},
    "layers": {
      "attn": {"q": {"kernel": normal(1, L, D, D), "bias": normal(2, L, D)}},
      "mlp": {"up": {"kernel": normal(3, L, D, F)}},
      "norm": {"scale": normal(4, L, D)},
    },
    "head": {"kernel": normal(5, D, 40)},
  }


def packed():
  return quantize_tree(base(), {"layers/*": QuantizationConfig(block_size=8)})


def filled(params, seed=0):
  """Adapters with B drawn too, so that they change something."""
  keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
  return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


# PEFT's numbers. A and B are stored [r, in] and [out, r] there; y has the bias in it.

# Float32 sums over at most 64 products of size 1, at outputs of size 1 to 10.
PEFT_RTOL, PEFT_ATOL = 2e-5, 2e-5


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_golden(shared, method):
  golden = np.load(shared / "golden" / "peft_linear" / "golden.npz")
  x, dy, w, bias = (jnp.asarray(golden[name]) for name in ("x", "dy", "W", "bias"))
  a, b = jnp.asarray(golden[f"{method}.A"].T), jnp.asarray(golden[f"{method}.B"].T)
  scaling = golden[f"{method}.scaling"]
  assert b.any() and a.shape == (64, 8)
  # scaling is alpha / 8 and alpha / √8, of the same alpha.
  alpha = float(golden["lora.scaling"]) * 8
  cfg = LoRAConfig(rank=8, alpha=alpha, rank_stabilized=method == "rslora")
  assert cfg.scaling(8, alpha) == pytest.approx(float(scaling), rel=1e-6)

  def f(x, a, b):
    return x @ w.T + bias[None] + lora.apply(x, a, b, jnp.asarray(scaling))

  y, pullback = jax.vjp(f, x, a, b)
  dx, da, db = pullback(dy)
  merged = lora.merge(
    {"q": {"kernel": w.T}},
    {"q": {"lora_a": a, "lora_b": b}},
    {"q": {"scaling": jnp.asarray(scaling)}},
  )
  ours = {"y": y, "dx": dx, "dA": da.T, "dB": db.T, "merged": merged["q"]["kernel"].T}
  for name, value in ours.items():
    np.testing.assert_allclose(
      value, golden[f"{method}.{name}"], rtol=PEFT_RTOL, atol=PEFT_ATOL, err_msg=name
    )


# init


@pytest.mark.parametrize("frozen", [base, packed])
def test_init_shapes(frozen):
  cfg = LoRAConfig(rank=4, targets=("layers/*", "head"), dropout=0.1)
  params, constants = lora.init(jax.random.key(0), frozen(), cfg)
  shapes = {path: (leaf.shape, leaf.dtype.name) for path, leaf in tree_paths.leaves(params).items()}
  assert shapes == {
    "head/lora_a": ((D, 4), "float32"),
    "head/lora_b": ((4, 40), "float32"),
    "layers/attn/q/lora_a": ((L, D, 4), "float32"),
    "layers/attn/q/lora_b": ((L, 4, D), "float32"),
    "layers/mlp/up/lora_a": ((L, D, 4), "float32"),
    "layers/mlp/up/lora_b": ((L, 4, F), "float32"),
  }
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), constants["head"]) == {
    "scaling": ((), "float32"),
    "rank": ((), "int32"),
    "dropout": ((), "float32"),
  }
  for layer in (constants["layers"]["attn"]["q"], constants["layers"]["mlp"]["up"]):
    np.testing.assert_array_equal(layer["scaling"], [4, 4, 4])
    np.testing.assert_array_equal(layer["rank"], [4, 4, 4])
    np.testing.assert_array_equal(layer["dropout"], np.full(3, 0.1, np.float32))


def test_init_has_no_dropout_constant_without_dropout():
  _, constants = lora.init(jax.random.key(0), base(), LoRAConfig(rank=2))
  assert all("dropout" not in path for path in tree_paths.leaves(constants))


def test_a_is_uniform_and_b_zero():
  frozen = {"q": {"kernel": jnp.zeros((400, 300))}}
  params, _ = lora.init(jax.random.key(0), frozen, LoRAConfig(rank=100, targets=("q",)))
  a = np.asarray(params["q"]["lora_a"])
  bound = 1 / np.sqrt(400)
  assert np.abs(a).max() <= bound and np.abs(a).max() > 0.999 * bound
  # The mean of 40,000 draws, and their variance, within 5 standard errors.
  spread = bound / np.sqrt(3)
  assert abs(a.mean()) < 5 * spread / 200
  assert abs(a.var() / spread**2 - 1) < 5 * np.sqrt(0.8) / 200
  assert not np.asarray(params["q"]["lora_b"]).any()


def test_layers_and_targets_draw_their_own():
  params, _ = lora.init(jax.random.key(0), base(), LoRAConfig(rank=4))
  a = params["layers"]["attn"]["q"]["lora_a"]
  assert (a[0] != a[1]).all() and (a != params["layers"]["mlp"]["up"]["lora_a"]).all()
  other, _ = lora.init(jax.random.key(1), base(), LoRAConfig(rank=4))
  assert (a != other["layers"]["attn"]["q"]["lora_a"]).all()


def test_a_target_changes_no_other():
  key = jax.random.key(0)
  few, constants = lora.init(key, base(), LoRAConfig(rank=4, targets=("*/q",)))
  assert list(few["layers"]) == ["attn"]
  many, more = lora.init(key, packed(), LoRAConfig(rank=4, targets=("*/q", "*/up", "head")))
  assert same(few["layers"]["attn"], many["layers"]["attn"])
  assert same(constants["layers"]["attn"], more["layers"]["attn"])


def test_the_draw_is_the_same_in_every_process():
  # Python's own hash of a string is not.
  code = (
    "import jax, jax.numpy as jnp; from qlora_jax import lora;"
    "p, _ = lora.init(jax.random.key(0), {'q': {'kernel': jnp.zeros((4, 4))}},"
    " lora.LoRAConfig(rank=2, targets=('q',)));"
    "print(p['q']['lora_a'].tolist())"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout
  params, _ = lora.init(
    jax.random.key(0), {"q": {"kernel": jnp.zeros((4, 4))}}, LoRAConfig(rank=2, targets=("q",))
  )
  assert out.strip() == str(params["q"]["lora_a"].tolist())


def test_init_under_jit():
  cfg = LoRAConfig(rank=4)
  key, frozen = jax.random.key(0), packed()
  assert same(jax.jit(lambda key: lora.init(key, frozen, cfg))(key), lora.init(key, frozen, cfg))


# Ranks that differ by layer

PATTERNS = LoRAConfig(
  rank=4,
  alpha=8,
  targets=("*/q", "layers/[02]/mlp/up"),
  rank_pattern={"layers/1/*": 2, "layers/2/attn/q/kernel": 6},
  alpha_pattern={"layers/2/*": 3.0},
)


def test_patterns():
  params, constants = lora.init(jax.random.key(0), packed(), PATTERNS)
  q, up = constants["layers"]["attn"]["q"], constants["layers"]["mlp"]["up"]
  np.testing.assert_array_equal(q["rank"], [4, 2, 6])
  np.testing.assert_array_equal(q["scaling"], [2, 4, 0.5])
  # Layer 1 is no target: no rank, no scaling.
  np.testing.assert_array_equal(up["rank"], [4, 0, 4])
  np.testing.assert_array_equal(up["scaling"], [2, 0, 0.75])
  a = np.asarray(params["layers"]["attn"]["q"]["lora_a"])
  assert a.shape == (L, D, 6)
  for layer, rank in enumerate((4, 2, 6)):
    assert a[layer, :, :rank].all() and not a[layer, :, rank:].any()
  up_a = np.asarray(params["layers"]["mlp"]["up"]["lora_a"])
  assert up_a[0].all() and not up_a[1].any() and up_a[2].all()


def test_rank_stabilized_scaling_by_layer():
  cfg = dataclasses.replace(PATTERNS, rank_stabilized=True)
  _, constants = lora.init(jax.random.key(0), base(), cfg)
  expected = [8 / 2, 8 / np.sqrt(2), 3 / np.sqrt(6)]
  np.testing.assert_allclose(constants["layers"]["attn"]["q"]["scaling"], expected, rtol=1e-6)


def test_padding_stays_zero_as_it_trains():
  params, constants = lora.init(jax.random.key(0), base(), PATTERNS)
  adapter, scaling = params["layers"]["attn"]["q"], constants["layers"]["attn"]["q"]["scaling"]
  x = jax.random.normal(jax.random.key(1), (L, 5, D))

  def loss(adapter):
    y = jax.vmap(lora.apply)(x, adapter["lora_a"], adapter["lora_b"], scaling)
    return jnp.square(y - 1).sum()

  for _ in range(3):
    gradient = jax.grad(loss)(adapter)
    adapter = jax.tree.map(lambda p, g: p - np.float32(1e-3) * g, adapter, gradient)
  for layer, rank in enumerate((4, 2, 6)):
    a, b = adapter["lora_a"][layer], adapter["lora_b"][layer]
    assert a[:, :rank].all() and b[:rank].all()
    assert not a[:, rank:].any() and not b[rank:].any()
    # So it is the very adapter of its own rank.
    own = lora.apply(x[layer], a[:, :rank], b[:rank], scaling[layer])
    padded = lora.apply(x[layer], a, b, scaling[layer])
    np.testing.assert_allclose(own, padded, rtol=1e-5, atol=1e-6)


def test_count():
  params, constants = lora.init(jax.random.key(0), packed(), PATTERNS)
  adapters = (4 + 2 + 6) * (D + D) + (4 + 0 + 4) * (D + F)
  assert lora.count(params, constants) == adapters
  # Full leaves count in full.
  assert lora.count({**params, "final_norm": {"scale": jnp.ones(D)}}, constants) == adapters + D
  params, constants = lora.init(jax.random.key(0), base(), LoRAConfig(rank=3, targets=("head",)))
  assert lora.count(params, constants) == 3 * (D + 40)
  assert lora.count({}, {}) == 0


# apply


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_apply_is_in_the_dtype_of_x(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 3, D), dtype)
  a, b = jax.random.normal(keys[1], (D, 4)), jax.random.normal(keys[2], (4, F))
  y = lora.apply(x, a, b, jnp.asarray(0.5))
  assert (y.dtype, y.shape) == (dtype, (2, 3, F))
  expected = 0.5 * (np.asarray(x, np.float64) @ np.asarray(a, np.float64)) @ np.asarray(b)
  # A, B, h and y are each rounded to dtype once; in float32 the sums round as well.
  eps = float(jnp.finfo(dtype).eps)
  magnitude = 0.5 * np.abs(np.asarray(x, np.float64)) @ np.abs(a) @ np.abs(b)
  assert (np.abs(np.asarray(y, np.float64) - expected) <= 3 * eps * magnitude).all()


def test_dropout():
  rate = jnp.asarray(0.25)
  x, eye = jnp.ones((200, 200)), jnp.eye(200)
  one = jnp.ones(())
  key = jax.random.key(0)
  # Without a key, or a rate, nothing is dropped.
  assert same(lora.apply(x, eye, eye, one, dropout=rate), x)
  assert same(lora.apply(x, eye, eye, one, key=key), x)
  y = np.asarray(lora.apply(x, eye, eye, one, dropout=rate, key=key))
  kept = y != 0
  np.testing.assert_allclose(y[kept], 1 / 0.75, rtol=1e-6)
  # A proportion over 40,000 draws, within 5 standard errors.
  assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / 40000)
  again = lora.apply(x, eye, eye, one, dropout=rate, key=key)
  assert same(again, jnp.asarray(y))
  other = lora.apply(x, eye, eye, one, dropout=rate, key=jax.random.key(1))
  assert not same(other, jnp.asarray(y))
  # The gradient passes where the element was kept.
  gradient = jax.grad(lambda x: lora.apply(x, eye, eye, one, dropout=rate, key=key).sum())(x)
  np.testing.assert_array_equal(np.asarray(gradient) != 0, kept)


# merge


def numpy_merged(w, adapter, scaling):
  a, b = (np.asarray(adapter[name], np.float64) for name in ("lora_a", "lora_b"))
  scaling = np.asarray(scaling, np.float64)
  return np.asarray(w, np.float64) + scaling[..., None, None] * (a @ b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("frozen", [base, packed])
def test_merge(frozen, dtype):
  frozen = frozen()
  cfg = LoRAConfig(rank=4, targets=("layers/*", "head"))
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  params = filled(params)
  merged = lora.merge(frozen, params, constants, dtype)
  assert jax.tree.structure(merged) == jax.tree.structure(base())
  assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
  for path in (("layers", "attn", "q"), ("layers", "mlp", "up"), ("head",)):
    w, adapter, constant, ours = frozen, params, constants, merged
    for name in path:
      w, adapter, constant, ours = w[name], adapter[name], constant[name], ours[name]
    w = w["kernel"]
    dense = w if isinstance(w, jax.Array) else dequantize(w)
    expected = numpy_merged(dense, adapter, constant["scaling"])
    np.testing.assert_allclose(
      np.asarray(ours["kernel"], np.float64),
      expected,
      rtol=float(jnp.finfo(dtype).eps),
      atol=1e-5 if dtype == jnp.float32 else 2e-2,
    )
  # What has no adapter is itself.
  np.testing.assert_array_equal(
    merged["layers"]["attn"]["q"]["bias"], frozen["layers"]["attn"]["q"]["bias"].astype(dtype)
  )


def test_merge_rounds_once():
  # W + s·A·B = 1 + 2^-9 + 2^-10 rounds up to the next bfloat16, 1 + 2^-7; W, or the product,
  # rounded first would give 1.
  frozen = {"q": {"kernel": jnp.full((1, 1), 1 + 2**-9)}}
  params = {"q": {"lora_a": jnp.full((1, 1), 2**-10), "lora_b": jnp.full((1, 1), 2.0)}}
  merged = lora.merge(frozen, params, {"q": {"scaling": jnp.asarray(1.5)}}, jnp.bfloat16)
  assert merged["q"]["kernel"].item() == 1 + 2**-7


def test_merge_without_adapters_dequantizes():
  frozen = packed()
  merged = lora.merge(frozen, {}, {})
  np.testing.assert_array_equal(
    merged["layers"]["mlp"]["up"]["kernel"], dequantize(frozen["layers"]["mlp"]["up"]["kernel"])
  )


def test_merge_takes_full_leaves_in_the_weights_place():
  frozen = packed()
  cfg = LoRAConfig(rank=4, targets=("*/q",))
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  params = filled(params)
  other = base()["layers"]["norm"]["scale"] + 1
  kernel = base()["layers"]["attn"]["q"]["kernel"] * 2
  params["layers"]["norm"] = {"scale": other}
  # An adapter on a weight trained in full adds to the full leaf, as the layers have it.
  params["layers"]["attn"]["q"]["kernel"] = kernel
  merged = lora.merge(frozen, params, constants)["layers"]
  np.testing.assert_array_equal(merged["norm"]["scale"], other)
  scaling = constants["layers"]["attn"]["q"]["scaling"]
  np.testing.assert_allclose(
    merged["attn"]["q"]["kernel"],
    numpy_merged(kernel, params["layers"]["attn"]["q"], scaling),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("path", ["layers/attn/k/lora_a", "final_norm/scale"])
def test_merge_refuses_what_the_base_has_no_weight_for(path):
  params = tree_paths.nest({path: jnp.ones((L, D, 4))})
  with pytest.raises(ValueError) as error:
    lora.merge(base(), params, {})
  assert str(error.value) == f"merge: {path}: the base has no weight there"


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_have_adapters_of_their_own(stacked):
  # [..., E, K, N]: an axis that is no stack of layers shares a rank and a scaling.
  experts, leading = 2, (L,) if stacked else ()
  w = jax.random.normal(jax.random.key(0), (*leading, experts, D, F))
  frozen = {"layers" if stacked else "block": {"experts": {"up": {"kernel": quantize(w)}}}}
  pattern = {"layers/1/*": 2} if stacked else {}
  cfg = LoRAConfig(rank=4, alpha=8.0, targets=("*/up",), rank_pattern=pattern)
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  (adapter,), (constant,) = (
    [tree["experts"]["up"] for tree in trees.values()] for trees in (params, constants)
  )
  a = np.asarray(adapter["lora_a"])
  assert a.shape == (*leading, experts, D, 4)
  assert adapter["lora_b"].shape == (*leading, experts, 4, F)
  assert (a[..., 0, :, :2] != a[..., 1, :, :2]).all()
  ranks = [4, 2, 4] if stacked else 4
  np.testing.assert_array_equal(constant["rank"], ranks)
  assert constant["scaling"].shape == leading
  assert lora.count(params, constants) == experts * (D + F) * np.sum(ranks)
  if stacked:
    assert a[1, :, :, :2].all() and not a[1, :, :, 2:].any()
  params = filled(params)
  merged = jax.tree.leaves(lora.merge(frozen, params, constants))[0]
  (adapter,) = (tree["experts"]["up"] for tree in params.values())
  scaling = np.asarray(constant["scaling"])[..., None]  # the axis of experts
  expected = numpy_merged(dequantize(quantize(w)), adapter, scaling)
  np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-4)


# Tables and tied heads


def tied():
  return {name: tree for name, tree in packed().items() if name != "head"}


def test_tables_and_tied_heads_are_explicit():
  # A wildcard takes in neither: what reads a table is not seen from its path.
  for frozen in (base(), tied()):
    params, _ = lora.init(jax.random.key(0), frozen, LoRAConfig(rank=2, targets=("*",)))
    assert set(params) == {"layers", "head"} & set(frozen)
  for names in (("embed", "head"), ("embed/embedding", "head/kernel")):
    cfg = LoRAConfig(rank=2, targets=names, dropout=0.1, rank_pattern={names[0]: 3})
    for frozen in (base(), tied()):
      params, constants = lora.init(jax.random.key(0), frozen, cfg)
      assert jax.tree.map(jnp.shape, params) == {
        "embed": {"lora_a": (40, 3), "lora_b": (3, D)},
        "head": {"lora_a": (D, 2), "lora_b": (2, 40)},
      }
      assert lora.count(params, constants) == 3 * (40 + D) + 2 * (D + 40)
      # A lookup drops nothing, and starts as PEFT's.
      assert "dropout" not in constants["embed"] and "dropout" in constants["head"]
      assert not params["embed"]["lora_a"].any() and params["embed"]["lora_b"].all()


@pytest.mark.parametrize("targets", [("embed",), ("head",), ("embed", "head")])
def test_merge_unties_what_the_adapters_tell_apart(targets):
  frozen = tied()
  params, constants = lora.init(jax.random.key(0), frozen, LoRAConfig(rank=4, targets=targets))
  params = filled(params)
  merged = lora.merge(frozen, params, constants)
  table = np.asarray(frozen["embed"]["embedding"])
  expected = {"embed": table, "head": table.T}
  for name in targets:
    expected[name] = numpy_merged(expected[name], params[name], constants[name]["scaling"])
  np.testing.assert_allclose(merged["embed"]["embedding"], expected["embed"], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(merged["head"]["kernel"], expected["head"], rtol=1e-5, atol=1e-5)
  if "embed" not in targets:
    np.testing.assert_array_equal(merged["embed"]["embedding"], table)
  # Without an adapter on either the head stays tied.
  params, constants = lora.init(jax.random.key(0), frozen, LoRAConfig(rank=4, targets=("*/q",)))
  assert "head" not in lora.merge(frozen, filled(params), constants)


def test_merge_of_a_tied_table_trained_in_full():
  # Both read it: it stays one weight.
  frozen, table = tied(), jnp.ones((40, D))
  merged = lora.merge(frozen, {"embed": {"embedding": table}}, {})
  assert "head" not in merged
  np.testing.assert_array_equal(merged["embed"]["embedding"], table)
  # An adapter on the head adds to it.
  cfg = LoRAConfig(rank=4, targets=("head",), modules_to_save=("embed",))
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  np.testing.assert_array_equal(params["embed"]["embedding"], frozen["embed"]["embedding"])
  params = filled(params)
  merged = lora.merge(frozen, params, constants)
  expected = numpy_merged(
    params["embed"]["embedding"].T, params["head"], constants["head"]["scaling"]
  )
  np.testing.assert_allclose(merged["head"]["kernel"], expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(merged["embed"]["embedding"], params["embed"]["embedding"])
  with pytest.raises(ValueError, match=r"lora.modules_to_save: embed: the head is tied to it and"):
    lora.init(jax.random.key(0), frozen, dataclasses.replace(cfg, variant="dora"))


# Weights trained in full


@pytest.mark.parametrize("frozen", [base, packed])
def test_modules_to_save_are_copied(frozen):
  frozen = frozen()
  cfg = LoRAConfig(
    rank=4,
    targets=("*/mlp/up",),
    modules_to_save=("layers/*/attn/q", "layers/*/norm/scale", "head"),
  )
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  full = {path for path in tree_paths.leaves(params) if "lora" not in path}
  # A module with all its weights.
  assert full == {
    "layers/attn/q/kernel",
    "layers/attn/q/bias",
    "layers/norm/scale",
    "head/kernel",
  }
  dense = lora.merge(frozen, {}, {})
  for path in full:
    leaf = tree_paths.leaves(params)[path]
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, tree_paths.leaves(dense)[path])
  adapters = 4 * (D + F) * L
  assert lora.count(params, constants) == adapters + L * D * (D + 1) + L * D + D * 40
  # They are no aliases: a step that is given params to overwrite leaves the base.
  jax.jit(lambda p: jax.tree.map(lambda x: x + np.float32(1), p), donate_argnums=0)(params)
  assert np.isfinite(np.asarray(frozen["layers"]["norm"]["scale"])).all()


def test_a_tied_head_gets_a_kernel_of_its_own():
  frozen = tied()
  cfg = LoRAConfig(rank=4, modules_to_save=("head",))
  params, constants = lora.init(jax.random.key(0), frozen, cfg)
  np.testing.assert_array_equal(params["head"]["kernel"], frozen["embed"]["embedding"].T)
  merged = lora.merge(frozen, filled(params), constants)
  np.testing.assert_array_equal(merged["head"]["kernel"], filled(params)["head"]["kernel"])
  np.testing.assert_array_equal(merged["embed"]["embedding"], frozen["embed"]["embedding"])
  cfg = LoRAConfig(rank=4, modules_to_save=("*",), targets=("embed",))
  with pytest.raises(ValueError, match="modules_to_save: embed: a target too"):
    lora.init(jax.random.key(0), frozen, cfg)


def test_full_leaves_are_float32_whatever_the_base_is_stored_in():
  frozen = {"q": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
  params, _ = lora.init(
    jax.random.key(0),
    {**frozen, "p": {"kernel": jnp.ones((4, 4))}},
    LoRAConfig(rank=2, targets=("p",), modules_to_save=("q",)),
  )
  assert params["q"]["kernel"].dtype == jnp.float32


# Errors


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(rank=0), "rank: 0; a rank is at least 1"),
    (dict(alpha=0.0), "alpha: 0.0; an alpha is above 0"),
    (dict(alpha=float("nan")), "alpha: nan"),
    (dict(targets=()), "targets: empty; at least one pattern"),
    (dict(targets="*/q"), "targets: '*/q'; a tuple of patterns"),
    (dict(dropout=1.0), "dropout: 1.0; a probability in [0, 1)"),
    (dict(dropout=-0.1), "dropout: -0.1"),
    (dict(modules_to_save="head"), "modules_to_save: 'head'; a tuple of patterns"),
    (dict(rank_pattern={"*/q": 0}), "rank_pattern['*/q']: 0; a rank is at least 1"),
    (dict(alpha_pattern={"*/q": -1.0}), "alpha_pattern['*/q']: -1.0; an alpha is above 0"),
  ],
)
def test_impossible_configs(kwargs, message):
  with pytest.raises(ValueError) as error:
    LoRAConfig(**kwargs)
  assert message in str(error.value)


@pytest.mark.parametrize(
  "kwargs, messages",
  [
    (dict(targets=("*/k",)), ["lora.targets: pattern '*/k' matches no weight; near paths: ", "/q"]),
    # Of two, the one that matches nothing is named.
    (dict(targets=("*/q", "*/nothing")), ["lora.targets: pattern '*/nothing' matches no weight"]),
    # Vectors are no targets, and tables only by their names.
    (dict(targets=("*/norm/*",)), ["'*/norm/*' matches no weight"]),
    (dict(targets=("embed/*",)), ["'embed/*' matches no weight"]),
    (
      dict(targets=("embed",), variant="dora"),
      ["lora.variant: 'dora'; embed, a lookup, takes plain"],
    ),
    (
      dict(targets=("embed",), lora_bias=True),
      ["lora.lora_bias: True; embed, a lookup, takes pla"],
    ),
    (
      dict(modules_to_save=("final_nrom",)),
      ["lora.modules_to_save: pattern 'final_nrom' matches no weight"],
    ),
    (
      dict(modules_to_save=("layers/[01]/norm",)),
      ["lora.modules_to_save: pattern 'layers/[01]/norm' matches 2 of the 3 layers of layers/norm"],
    ),
    (
      dict(modules_to_save=("*/attn/q",)),
      ["lora.modules_to_save: layers/attn/q: a target too; a weight is trained in full or has"],
    ),
    (dict(targets=("*/q",), rank_pattern={"*/up": 2}), ["lora.rank_pattern: pattern '*/up'"]),
    (dict(targets=("*/q",), alpha_pattern={"nope": 2.0}), ["lora.alpha_pattern: pattern 'nope'"]),
    (
      dict(rank_pattern={"*/q": 2, "layers/1/*": 3}),
      ["lora.rank_pattern: layers/1/attn/q: '*/q' says 2 and 'layers/1/*' says 3"],
    ),
    (
      dict(alpha_pattern={"*/q": 2.0, "layers/1/*": 3.0}),
      ["lora.alpha_pattern: layers/1/attn/q: '*/q' says 2.0 and 'layers/1/*' says 3.0"],
    ),
    (
      dict(rank_pattern={"layers/2/*": 17}),
      ["layers/2/attn/q: rank 17; at most min(K, N) = 16 of its weight [16, 16]"],
    ),
  ],
)
def test_init_refuses(kwargs, messages):
  with pytest.raises(ValueError) as error:
    lora.init(jax.random.key(0), packed(), LoRAConfig(**kwargs))
  for message in messages:
    assert message in str(error.value)


def test_patterns_that_agree_may_overlap():
  cfg = LoRAConfig(rank_pattern={"*/q": 2, "layers/1/attn/*": 2})
  _, constants = lora.init(jax.random.key(0), base(), cfg)
  np.testing.assert_array_equal(constants["layers"]["attn"]["q"]["rank"], [2, 2, 2])


def test_adapters_on_a_list_of_layers():
  # Layers that are not stacked have paths of their own, and scalars in constants.
  frozen = {"layers": [{"q": {"kernel": quantize(jnp.ones((8, 4)))}} for _ in range(2)]}
  params, constants = lora.init(jax.random.key(0), frozen, LoRAConfig(rank=2, targets=("*/q",)))
  assert params["layers"]["0"]["q"]["lora_a"].shape == (8, 2)
  assert constants["layers"]["1"]["q"]["rank"].shape == ()
  assert (params["layers"]["0"]["q"]["lora_a"] != params["layers"]["1"]["q"]["lora_a"]).any()
