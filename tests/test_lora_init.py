"""Adapters that start as a part of the weight, against the papers' equations and PEFT's numbers."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import dequantize, lora, lora_init, quantize, quantize_tree
from qlora_jax.lora import LoRAConfig
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.quantized_tensor import is_quantized
from qlora_jax.truncated_svd import truncated_svd

# Float32 sums of a hundred terms of size 1.
CLOSE: Any = {"rtol": 0, "atol": 5e-5}

SINGLE = QuantizationConfig(double_quantization=False)


def matrix(k, n, seed=0):
  return np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)


def best(w, rank):
  """The truncated SVD in float64."""
  u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
  return u[:, :rank] * s[:rank] @ vt[:rank]


def restored(leaf):
  return np.asarray(dequantize(leaf) if is_quantized(leaf) else leaf, np.float64)


def start(w, rules, cfg):
  """(base, A, B, scaling) of one matrix, as float64."""
  frozen, params, constants = lora_init.initialize(
    jax.random.key(0), {"w": jnp.asarray(w)}, rules, cfg
  )
  a, b = (np.asarray(params["w"][name], np.float64) for name in ("lora_a", "lora_b"))
  return restored(frozen["w"]), a, b, float(constants["w"]["scaling"])


def config(init, rank=8, alpha=16.0, **fields):
  fields = {"svd_iterations": None, **fields}
  return LoRAConfig(rank=rank, alpha=alpha, targets=("w",), init=init, **fields)


# The decomposition.


@pytest.mark.parametrize("steps", [1, 8, None])
@pytest.mark.parametrize("shape", [(40, 40), (200, 90), (90, 200)])
def test_truncated_svd_of_a_falling_spectrum(shape, steps):
  rank, size = 5, min(shape)
  u, _ = np.linalg.qr(matrix(shape[0], size, 1))
  v, _ = np.linalg.qr(matrix(shape[1], size, 2))
  spectrum = 0.8 ** np.arange(size)
  w = (u * spectrum @ v.T).astype(np.float32)
  own_u, s, own_v = truncated_svd(jnp.asarray(w), rank, jax.random.key(0), steps)
  # The sketch of 21 has lost .8^21 / .8^4 to the power 2 a step: .02%.
  atol = 2e-2 if steps == 1 else 1e-5
  np.testing.assert_allclose(s, spectrum[:rank], rtol=0, atol=atol)
  np.testing.assert_allclose(own_u * s[None, :] @ own_v.T, best(w, rank), rtol=0, atol=atol)
  np.testing.assert_allclose(own_u.T @ own_u, np.eye(rank), **CLOSE)
  np.testing.assert_allclose(own_v.T @ own_v, np.eye(rank), **CLOSE)


def test_truncated_svd_of_a_flat_spectrum():
  w = matrix(256, 256)
  rank = 32
  _, s, _ = truncated_svd(jnp.asarray(w), rank, jax.random.key(0))
  spectrum = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
  least = np.sqrt(np.square(spectrum[rank:]).sum())
  left = np.sqrt(np.square(spectrum).sum() - np.square(np.asarray(s, np.float64)).sum())
  assert least <= left * (1 + 1e-6)
  assert left < 1.0002 * least


# One matrix: the papers' equations.


def test_pissa_leaves_the_function_as_it_is():
  w = matrix(48, 40)
  base, a, b, s = start(w, {}, config("pissa"))
  np.testing.assert_allclose(s * a @ b, best(w, 8), **CLOSE)
  np.testing.assert_allclose(base + s * a @ b, w, **CLOSE)
  # A and B share the singular values: AᵀA = BBᵀ = S / s.
  singular = np.linalg.svd(w, compute_uv=False)[:8] / s
  np.testing.assert_allclose(a.T @ a, np.diag(singular), **CLOSE)
  np.testing.assert_allclose(b @ b.T, np.diag(singular), **CLOSE)


def test_qpissa_quantizes_the_rest():
  w = matrix(128, 40)
  base, a, b, s = start(w, {"w": SINGLE}, config("pissa"))
  np.testing.assert_allclose(s * a @ b, best(w, 8), **CLOSE)
  rest = jnp.asarray(w - s * a @ b, jnp.float32)
  np.testing.assert_allclose(
    base, restored(quantize(rest, double_quantization=False)), rtol=0, atol=1e-5
  )


def test_olora_is_a_qr_decomposition():
  w = matrix(48, 40)
  base, a, b, s = start(w, {}, config("olora"))
  q, r = np.linalg.qr(np.asarray(w, np.float64).T)
  np.testing.assert_allclose(a @ b, (q[:, :8] @ r[:8]).T, **CLOSE)
  np.testing.assert_allclose(b @ b.T, np.eye(8), **CLOSE)
  np.testing.assert_allclose(base + s * a @ b, w, **CLOSE)


@pytest.mark.parametrize("ignores", [False, True])
def test_loftq_alternates(ignores):
  """Step by step in float64; with the scaling, and as PEFT has it, without."""
  w = matrix(128, 40)
  cfg = config("loftq", loftq_iterations=3, loftq_ignores_scaling=ignores)
  base, a, b, s = start(w, {"w": QuantizationConfig(codebook="nf3")}, cfg)
  product = np.zeros_like(w, np.float64)
  for _ in range(3):
    whole = restored(quantize(jnp.asarray(w - product, jnp.float32), codebook="nf3"))
    product = best(w - whole, 8)
  # A code at a midpoint may fall to the other side: few do.
  assert (np.abs(base - whole) > 1e-4).mean() < 2e-3
  own = a @ b if ignores else s * a @ b
  assert np.linalg.norm(own - product) < 0.02 * np.linalg.norm(product)
  error = np.linalg.norm(base + s * a @ b - w)
  plain = np.linalg.norm(restored(quantize(jnp.asarray(w), codebook="nf3")) - w)
  # s = 2: what ignores it is wrong by as much as it meant to correct.
  assert error < 0.85 * plain if not ignores else error > plain


@pytest.mark.parametrize("rank", [8, 3])
def test_lora_ga_takes_the_gradients_directions(rank):
  w, gradient = matrix(48, 40), matrix(48, 40, 7)
  # In a stack whose largest rank is 8.
  cfg = LoRAConfig(
    rank=rank,
    targets=("layers/[12]/w",),
    rank_pattern={"layers/2/w": 8},
    init="lora_ga",
    lora_ga_gamma=4.0,
    svd_iterations=None,
  )
  path = "layers/w/kernel"
  frozen, params, constants = lora_init.initialize(
    jax.random.key(0),
    {"layers": {"w": {"kernel": jnp.asarray(np.stack([w] * 3))}}},
    {},
    cfg,
    gradients={path: np.stack([gradient] * 3)},
  )
  u, _, vt = np.linalg.svd(np.asarray(gradient, np.float64))
  own = params["layers"]["w"]
  a, b = own["lora_a"][1], own["lora_b"][1]
  c = 40**0.25 / 2
  # The signs are each vector's own.
  np.testing.assert_allclose(np.abs(a[:, :rank]), np.abs(c * u[:, :rank]), **CLOSE)
  np.testing.assert_allclose(np.abs(b[:rank]), np.abs(c * vt[rank : 2 * rank]), **CLOSE)
  assert not np.abs(a[:, rank:]).any()
  assert not np.abs(b[rank:]).any()
  merged = lora.merge(frozen, params, constants)["layers"]["w"]["kernel"]
  np.testing.assert_allclose(merged, np.stack([w] * 3), **CLOSE)
  trained = moved(params)
  plain, fixed, _ = lora.plain(trained, constants, cfg, params)
  assert_same_merge(
    ({"layers": {"w": {"kernel": jnp.asarray(np.stack([w] * 3))}}}, plain, fixed),
    (frozen, trained, constants),
  )


@pytest.mark.parametrize(
  ("gradients", "message"),
  [
    (None, "its gradient is missing"),
    ({"w": np.ones((40, 48))}, r"w: a gradient \[40, 48\] of a weight \[48, 40\]"),
    ({"w": np.ones((48, 40))}, r"rank 24; it takes 2 · rank directions, of min\(K, N\) = 40"),
  ],
)
def test_lora_ga_asks_for_gradients(gradients, message):
  with pytest.raises(ValueError, match=message):
    lora_init.initialize(
      jax.random.key(0), {"w": jnp.ones((48, 40))}, {}, config("lora_ga", 24), gradients=gradients
    )


def test_eva_spans_the_inputs_and_shares_ranks_out():
  """Layers' inputs of known spectra, and the shares counted by hand."""
  spectra = {"a": 0.5 ** np.arange(16), "b": 1 - 0.01 * np.arange(16), "c": 0.9 ** np.arange(16)}
  bases = {name: np.linalg.qr(matrix(16, 16, i))[0] for i, name in enumerate(spectra)}
  frozen = {name: {"kernel": jnp.ones((16, 12))} for name in spectra}
  moments = {f"{name}/kernel": bases[name] * spectra[name] @ bases[name].T for name in spectra}
  cfg = LoRAConfig(rank=4, alpha=6.0, targets=("*",), alpha_pattern={"b": 8.0}, init="eva")
  params, constants, shared = lora_init.eva(jax.random.key(0), frozen, cfg, moments)
  # a: .500 .250 .125 .063; b: .068 .067 .066 …; c: .123 .110 .099 .089 .081 .072 .065 .059.
  # The twelve largest are 3 of a, 3 of b (down to .0662) and 6 of c (its seventh is .0654).
  ranks = {"a": 3, "b": 3, "c": 6}
  assert shared.rank_pattern == ranks
  for name, rank in ranks.items():
    own = np.asarray(params[name]["lora_a"], np.float64)
    lead = bases[name][:, :rank]
    np.testing.assert_allclose(own @ own.T, lead @ lead.T, **CLOSE)
    assert not np.asarray(params[name]["lora_b"]).any()
    assert int(constants[name]["rank"]) == rank
    np.testing.assert_allclose(constants[name]["scaling"], 2.0 if name == "b" else 1.5)
  # No layer gets more than rho times its own.
  capped = lora_init.eva(jax.random.key(0), frozen, dataclasses.replace(cfg, eva_rho=1.0), moments)[
    2
  ]
  assert capped.rank_pattern == {"a": 4, "b": 4, "c": 4}
  with pytest.raises(ValueError, match=r"eva: c/kernel: a second moment \[16, 16\] is needed"):
    lora_init.eva(jax.random.key(0), frozen, cfg, {k: moments[k] for k in list(moments)[:2]})
  with pytest.raises(ValueError, match="init: 'eva' with variant 'vera', whose A and B are fixed"):
    dataclasses.replace(cfg, variant="vera")
  for refuses in (
    lambda: lora.init(jax.random.key(0), frozen, cfg),
    lambda: lora_init.initialize(jax.random.key(0), frozen, {}, cfg),
  ):
    with pytest.raises(ValueError, match="'eva' starts from activations"):
      refuses()
  with pytest.raises(ValueError, match="eva: b: a second moment of trace 0"):
    nothing = {**moments, "b/kernel": np.zeros((16, 16))}
    lora_init.eva(jax.random.key(0), frozen, cfg, nothing)


# PEFT's numbers: A is [r, in] there and B [out, r], and signs are arbitrary.


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq_iter1", "loftq_iter2", "loftq_iter5"])
def test_golden(shared, method):
  golden = np.load(shared / "golden" / "peft_linear" / "golden.npz")
  wanted = {name.partition(".")[2]: golden[name] for name in golden if name.startswith(method)}
  s = float(wanted["scaling"])
  init, _, iterations = method.partition("_iter")
  cfg = config(
    init,
    alpha=8 * s,
    loftq_iterations=int(iterations or 1),
    loftq_ignores_scaling=True,
  )
  rules = {"w": SINGLE} if init == "loftq" else {}
  frozen, params, constants = lora_init.initialize(
    jax.random.key(0), {"w": jnp.asarray(golden["W"].T)}, rules, cfg
  )
  base = restored(frozen["w"])
  np.testing.assert_allclose(base, wanted["base_weight"].T, **CLOSE)
  a, b = params["w"]["lora_a"], params["w"]["lora_b"]
  np.testing.assert_allclose(a @ b, (wanted["B"] @ wanted["A"]).T, **CLOSE)

  def y(a, b, x):
    return x @ jnp.asarray(base, jnp.float32) + lora.apply(x, a, b, constants["w"]["scaling"])

  x, dy = jnp.asarray(golden["x"]), jnp.asarray(golden["dy"])
  out, back = jax.vjp(y, a, b, x)
  da, db, dx = back(dy)
  loose: Any = {"rtol": 2e-4, "atol": 5e-4}
  np.testing.assert_allclose(out + golden["bias"][None, :], wanted["y"], **loose)
  np.testing.assert_allclose(dx, wanted["dx"], **loose)
  # Without the signs.
  np.testing.assert_allclose(a @ da.T, wanted["A"].T @ wanted["dA"], **loose)
  np.testing.assert_allclose(b.T @ db, wanted["B"] @ wanted["dB"].T, **loose)


# The published comparison: 512 × 512, rank 64, relative errors.


@pytest.mark.slow
@pytest.mark.parametrize(
  ("spectrum", "codebook"),
  # The other two: tests/experiments/test_quantization_error.py, by whole decompositions.
  [("gauss", "nf4"), ("lowrank+gauss", "nf2")],
)
def test_errors_of_the_oracle(shared, spectrum, codebook):
  oracle = json.loads((shared / "reference" / "oracle.json").read_text())["loftq"]
  expected = [oracle[f"{spectrum}|{codebook}|r64|seed{seed}"] for seed in (0, 1)]
  w = matrix(512, 512)
  if spectrum != "gauss":
    # Singular values k^-½.
    u, _, vt = np.linalg.svd(w)
    w = (u * np.arange(1, 513) ** -0.5 @ vt).astype(np.float32)
  rules = {"w": dataclasses.replace(SINGLE, codebook=codebook)}

  def error(base, a, b, s):
    return np.linalg.norm(base + s * a @ b - w) / np.linalg.norm(w)

  plain = restored(quantize_tree({"w": jnp.asarray(w)}, rules)["w"])
  found = {"qlora": np.linalg.norm(plain - w) / np.linalg.norm(w)}
  for name, cfg in {
    "loftq_T1": config("loftq", 64, loftq_iterations=1, svd_iterations=8),
    "loftq_T5": config("loftq", 64, loftq_iterations=5, svd_iterations=8),
    "qpissa": config("pissa", 64, svd_iterations=8),
  }.items():
    found[name] = error(*start(w, rules, cfg))
  for name, value in found.items():
    values = [each[name] for each in expected]
    scatter = max(abs(values[0] - values[1]), 0.004 * values[0])
    assert abs(value - np.mean(values)) < 3 * scatter, name


# Whole trees.

L, D, F = 3, 32, 48


def base():
  def normal(i, *shape):
    return jnp.asarray(np.random.default_rng(i).normal(size=shape).astype(np.float32))

  return {
    "embed": {"embedding": normal(0, 40, D)},
    "layers": {
      "attn": {"q": {"kernel": normal(1, L, D, D), "bias": normal(2, L, D)}},
      "mlp": {"up": {"kernel": normal(3, L, D, F)}},
      "experts": {"up": {"kernel": normal(4, L, 2, D, F)}},
    },
    "head": {"kernel": normal(5, D, 40)},
  }


RULES = {"layers/*": QuantizationConfig(block_size=16), "head": jnp.bfloat16}
# A layer without, and unequal ranks.
TREE = LoRAConfig(
  rank=4,
  alpha=6.0,
  targets=("layers/[12]/attn/q", "*/experts/up", "head"),
  rank_pattern={"layers/2/*": 2},
  init="pissa",
  svd_iterations=None,
)


@pytest.mark.parametrize("init", ["lora", "pissa", "olora", "loftq"])
def test_a_tree(init):
  cfg = dataclasses.replace(TREE, init=init)
  if init == "loftq":
    cfg = dataclasses.replace(cfg, targets=TREE.targets[:2])
  dense, key = base(), jax.random.key(0)
  frozen, params, constants = lora_init.initialize(key, dense, RULES, cfg)
  plain = quantize_tree(dense, RULES)
  assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, plain)
  expected, fixed = lora.init(key, plain, dataclasses.replace(cfg, init="lora"))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
  jax.tree.map(np.testing.assert_array_equal, constants, fixed)
  if init == "lora":
    jax.tree.map(np.testing.assert_array_equal, params, expected)
  # What has no adapter is quantized as ever.
  for a, b in (
    (frozen["layers"]["mlp"], plain["layers"]["mlp"]),
    (frozen["embed"], plain["embed"]),
    jax.tree.map(lambda x: x[0], (frozen["layers"]["attn"]["q"], plain["layers"]["attn"]["q"])),
  ):
    a, b = (jax.tree.map(np.asarray, each) for each in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)
  q = params["layers"]["attn"]["q"]
  assert not np.abs(q["lora_a"][0]).any() or init == "lora"
  assert not np.abs(q["lora_a"][2][:, 2:]).any()
  assert not np.abs(q["lora_b"][2][2:]).any()
  # The weights are about as near to the dense ones as codes of 4 bits are; LoftQ's are nearer.
  merged = lora.merge(frozen, params, constants)
  for part in ("attn/q", "experts/up"):
    group, name = part.split("/")
    w, made, coded = (
      np.asarray(restored(tree["layers"][group][name]["kernel"]))[1:]
      for tree in (dense, merged, plain)
    )
    error, usual = np.linalg.norm(made - w), np.linalg.norm(coded - w)
    assert error < (0.9 if init == "loftq" else 1.2) * usual


def test_every_method_of_one_stack_is_that_of_its_matrices():
  frozen, params, _ = lora_init.initialize(jax.random.key(0), base(), RULES, TREE)
  w = base()["layers"]["experts"]["up"]["kernel"][2, 1]
  experts = params["layers"]["experts"]["up"]
  a, b = (np.asarray(experts[name], np.float64)[2, 1] for name in ("lora_a", "lora_b"))
  scaling = 6.0 / 2
  np.testing.assert_allclose(scaling * a @ b, best(w, 2), **CLOSE)
  rest = quantize(jnp.asarray(w - scaling * a @ b, jnp.float32), block_size=16)
  kernel = jax.tree.map(lambda x: x[2, 1], frozen["layers"]["experts"]["up"]["kernel"])
  np.testing.assert_allclose(restored(kernel), restored(rest), rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_dora_starts_as_the_base(init):
  cfg = dataclasses.replace(TREE, init=init, variant="dora", targets=("*/attn/q", "*/mlp/up"))
  dense = base()
  frozen, params, constants = lora_init.initialize(jax.random.key(0), dense, {}, cfg)
  norm = np.linalg.norm(dense["layers"]["attn"]["q"]["kernel"], axis=-2)
  np.testing.assert_allclose(params["layers"]["attn"]["q"]["magnitude"], norm, rtol=1e-5)
  merged = lora.merge(frozen, params, constants)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), merged, dense)


@pytest.mark.parametrize(
  ("change", "fields", "message"),
  [
    (
      {},
      {"targets": ("embed",), "rank_pattern": {}},
      "lora.init: 'pissa'; embed, a lookup, takes plain",
    ),
    (
      {"head": None},
      {"targets": ("head",), "rank_pattern": {}},
      "lora.init: 'pissa' changes the base; head is tied",
    ),
    ({}, {"init": "loftq"}, "lora.init: 'loftq'; head is not quantized"),
    ({}, {"rank": 64, "rank_pattern": {}}, r"rank 64; at most min\(K, N\) = 32"),
  ],
)
def test_what_makes_no_sense_is_refused(change, fields, message):
  dense = {name: x for name, x in (base() | change).items() if x is not None}
  rules = {path: rule for path, rule in RULES.items() if path in dense or path != "head"}
  with pytest.raises(ValueError, match=message):
    lora_init.initialize(jax.random.key(0), dense, rules, dataclasses.replace(TREE, **fields))


def test_bad_weights_and_rules_are_refused_by_path():
  key, dense = jax.random.key(0), base()
  dense["layers"]["attn"]["q"]["kernel"] = (
    dense["layers"]["attn"]["q"]["kernel"].at[1, 2, 3].set(jnp.nan)
  )
  with pytest.raises(ValueError, match=r"layers/attn/q/kernel: index \[1\]: a weight that is not"):
    lora_init.initialize(key, dense, RULES, TREE)
  dense = base()
  dense["embed"]["embedding"] = dense["embed"]["embedding"].at[0, 0].set(1e6)
  with pytest.raises(ValueError, match=r"embed/embedding: .* beyond what float16 holds"):
    lora_init.initialize(key, dense, {"embed/*": jnp.float16}, TREE)
  with pytest.raises(ValueError, match=r"pattern 'tail' matches no weight"):
    lora_init.initialize(key, base(), {"tail": SINGLE}, TREE)
  with pytest.raises(ValueError, match=r"layers/attn/q: packed; an init needs the dense weights"):
    lora_init.initialize(key, quantize_tree(base(), RULES), {}, TREE)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"init": "pisa"}, "init: 'pisa'; one of .*; did you mean pissa?"),
    ({"variant": "vra"}, "variant: 'vra'; one of .*; did you mean vera?"),
    ({"variant": "vera", "init": "pissa"}, "init: 'pissa' with variant 'vera'"),
    ({"eva_rho": 0.5}, "eva_rho: 0.5; a finite number, 1 or more"),
    ({"lora_ga_gamma": 0.0}, "lora_ga_gamma: 0.0; a finite number above 0"),
    ({"calibration_batches": 0}, "calibration_batches: 0; at least 1"),
    ({"loftq_iterations": 0}, "loftq_iterations: 0; at least 1"),
    ({"svd_iterations": 0}, "svd_iterations: 0; at least 1, or None"),
  ],
)
def test_a_config_that_contradicts_itself(fields, message):
  with pytest.raises(ValueError, match=message):
    LoRAConfig(**fields)


# Back to an adapter of the original base.


def moved(params, seed=3):
  """As training leaves them: all have moved but the padding."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.where(x != 0, x + rng.normal(0, 0.1, x.shape).astype(np.float32), 0), params
  )


def assert_same_merge(one, other):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4),
    lora.merge(*one),
    lora.merge(*other),
  )


@pytest.mark.parametrize("fields", [{}, {"rank_stabilized": True}, {"variant": "dora"}])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_to_the_original_base(init, fields):
  targets = TREE.targets if fields.get("variant") != "dora" else ("layers/[12]/attn/q", "head")
  cfg = dataclasses.replace(TREE, init=init, targets=targets, **fields)
  frozen, initial, constants = lora_init.initialize(jax.random.key(0), base(), {}, cfg)
  trained = moved(initial)
  params, fixed, plain = lora.plain(trained, constants, cfg, initial)
  assert (plain.init, plain.rank, plain.rank_pattern) == ("lora", 8, {"layers/2/*": 4})
  assert_same_merge((base(), params, fixed), (frozen, trained, constants))
  # The config says what the constants say, so that a file of it does.
  _, again = lora.init(jax.random.key(0), base(), plain)
  for name in ("rank", "scaling"):
    for one, other in zip(
      *(each["layers"]["attn"]["q"][name][1:] for each in (again, fixed)), strict=True
    ):
      np.testing.assert_allclose(one, other, rtol=1e-6)


def test_converted_at_full_rank_it_is_no_larger_than_the_weight():
  cfg = dataclasses.replace(TREE, targets=("*/mlp/up",), rank=20, rank_pattern={})
  frozen, initial, constants = lora_init.initialize(jax.random.key(0), base(), {}, cfg)
  trained = moved(initial)
  params, fixed, _ = lora.plain(trained, constants, cfg, initial)
  assert params["layers"]["mlp"]["up"]["lora_a"].shape == (L, D, D)
  assert_same_merge((base(), params, fixed), (frozen, trained, constants))


def test_of_a_quantized_base_the_change_is_exact():
  """And the function is not: q's error stays with the base."""
  cfg = dataclasses.replace(TREE, init="loftq", targets=("*/attn/q",))
  frozen, initial, constants = lora_init.initialize(jax.random.key(0), base(), RULES, cfg)
  trained = moved(initial)

  def q(*trees):
    return np.asarray(lora.merge(*trees)["layers"]["attn"]["q"]["kernel"])

  change = q(frozen, trained, constants) - q(frozen, initial, constants)
  params, fixed, _ = lora.plain(trained, constants, cfg, initial)
  own = q(base(), params, fixed) - np.asarray(base()["layers"]["attn"]["q"]["kernel"])
  np.testing.assert_allclose(own, change, rtol=0, atol=1e-4)
  assert np.abs(q(base(), params, fixed) - q(frozen, trained, constants)).max() > 0.05


@pytest.mark.parametrize("fields", [{}, {"rank_stabilized": True}])
def test_loftq_that_ignores_the_scaling_is_converted_with_what_it_took_out(fields):
  """On the base that is whole without its A · B, s not being 1."""
  cfg = dataclasses.replace(
    TREE,
    init="loftq",
    targets=("layers/[12]/attn/q",),
    loftq_iterations=2,
    loftq_ignores_scaling=True,
    **fields,
  )
  frozen, initial, constants = lora_init.initialize(jax.random.key(0), base(), RULES, cfg)
  a, b = (np.asarray(initial["layers"]["attn"]["q"][name]) for name in ("lora_a", "lora_b"))
  merged = lora.merge(frozen, moved(initial), constants)
  whole = lora.merge(frozen, {}, {})
  q = whole["layers"]["attn"]["q"]
  q["kernel"] = q["kernel"] + np.matmul(a, b)
  params, fixed, _ = lora.plain(moved(initial), constants, cfg, initial)
  again = lora.merge(whole, params, fixed)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), again, merged)


def test_conversion_asks_for_the_start_where_there_was_one():
  frozen, params, constants = lora_init.initialize(jax.random.key(0), base(), {}, TREE)
  with pytest.raises(ValueError, match=r"'pissa' changed the base: `initial`"):
    lora.plain(params, constants, TREE)
  cfg = dataclasses.replace(TREE, init="lora")
  assert lora.plain(params, constants, cfg) == (params, constants, cfg)
  with pytest.raises(ValueError, match=r"initial: given, and lora\.init 'lora' left the base"):
    lora.plain(params, constants, cfg, params)
  with pytest.raises(ValueError, match=r"'pissa' changes the base; lora_init\.initialize makes"):
    lora.init(jax.random.key(0), frozen, TREE)
