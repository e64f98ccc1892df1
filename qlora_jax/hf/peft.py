"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

PEFT's A is `[r, in]` and its B `[out, r]`, one pair a layer (and an expert); ours are transposed
and stacked, with ranks that differ by layer padded with zeros. A weight that is trained in full
stands in the file whole.

Beside PEFT's files may lie `qlora_jax.json`, the fingerprint of the base: for each adapted weight
W with Δ = s · A · B the number p = ⟨W, Δ⟩ / ‖Δ‖². On the same base, in any precision, it comes out
the same; on a base that has the adapter merged in it is p + 1.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qlora_jax import lora, tree_paths
from qlora_jax.hf.files import new_directory, read_json, write_json
from qlora_jax.hf.peft_names import CONFIG, WEIGHTS, Names, base_names
from qlora_jax.hf.peft_reading import Reader, check_config
from qlora_jax.hf.peft_writing import Writer, card_text
from qlora_jax.lora import LoRAConfig
from qlora_jax.matmul import quantized_matmul
from qlora_jax.models.families import tensor_names
from qlora_jax.models.transformer import Transformer
from qlora_jax.quantized_tensor import is_quantized

_FINGERPRINT = "qlora_jax.json"
# Half way. p of the golden adapters moves by .002 in the median from a float32 base to its NF4 (.01
# for one of only four adapted weights; single weights by up to .015), and by 1.00 to a base that
# they are merged into (DoRA .96, and as much after NF4).
_MERGED = 0.5


def load_adapter(
  path: str | os.PathLike[str], frozen: Any, *, model: Transformer | None = None
) -> tuple[dict[str, Any], dict[str, Any], LoRAConfig]:
  """Reads a PEFT adapter for the base `frozen`.

  Args:
    path: a directory with adapter_config.json and adapter_model.safetensors.
    frozen: the base, packed or plain, or left in its files by `open_stored`.
    model: whose family names the layers; where None, the first family that has names for all of
      `frozen`.

  Returns:
    (params, constants, cfg): trees as `lora.init` makes them, and the config that would. A leaf
    keeps the file's dtype, or takes float32 where its layers have several. A stack of which the
    file holds some layers in full has the base's weights in the others.

  Raises:
    FileNotFoundError: the directory or a file is missing.
    ValueError: a kind of adapter that is not supported, named; a tensor that fits no weight of
      the base, or not its shape; targets without tensors; a base that the adapter is merged into.
  """
  directory = Path(path).absolute()
  for name in (CONFIG, WEIGHTS):
    if not (directory / name).exists():
      raise FileNotFoundError(f"{directory}: not a PEFT adapter: {name} was looked for")
  raw = read_json(directory / CONFIG)
  file = directory / WEIGHTS
  try:
    tensors = safetensors.numpy.load_file(file)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
  try:
    check_config(raw)
  except ValueError as error:
    raise ValueError(f"{directory / CONFIG}: {error}") from None
  names = base_names(frozen, model)
  reader = Reader(file, raw, frozen, names)
  for key in sorted(tensors):
    reader.add(key, tensors[key])
  params, constants, cfg = reader.finish()
  _check_fingerprint(directory, frozen, params, constants, names)
  return params, constants, cfg


def save_adapter(
  path: str | os.PathLike[str],
  params: Any,
  constants: Any,
  cfg: LoRAConfig,
  *,
  model: Transformer | None = None,
  frozen: Any = None,
  initial: Any = None,
  base_model_name: str | None = None,
  base_revision: str | None = None,
  card: str | Mapping[str, Any] | None = None,
) -> None:
  """Writes an adapter that PEFT opens, with a model card.

  Ranks and scalings are those in `constants`; where they differ from `cfg`'s, they go into
  PEFT's rank and alpha patterns. Tensors have the dtypes of `params`. Adapters that are not of
  PEFT's plain kind, or not of the original base, are made so first: see `lora.plain`, which says
  what is exact. (For the changed base itself, kept by `save_base`, give cfg with init "lora".)

  Args:
    path: must not exist.
    params, constants, cfg: as `lora.init` made them, trained.
    model: whose family names the layers; where None it is found from `frozen`, or from params.
    frozen: the base; its fingerprint is then written too, by which `load_adapter` refuses a base
      that the adapter is merged into.
    initial: the params before training, of an init that changes the base.
    base_model_name: the base that PEFT is to look for.
    base_revision: of that name.
    card: how it was trained, for the model card: text in Markdown, or facts by name.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: an adapter that PEFT cannot express, or a path that the files of no family name.
  """
  taken = None if initial is None else lora.taken_out(initial, constants, cfg)
  params, constants, cfg = lora.plain(params, constants, cfg, initial)
  flat = tree_paths.leaves(params)
  fixed = tree_paths.leaves(constants)
  if not any(leaf.endswith("/lora_a") for leaf in flat):
    raise ValueError(
      f"save_adapter: params {'has no LoRA matrix' if flat else 'is empty'}; there is no adapter "
      "to write"
    )
  writer = Writer(flat, fixed, cfg, frozen, model)
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model_name,
    "revision": base_revision,
    "r": cfg.rank,
    "lora_alpha": int(cfg.alpha) if float(cfg.alpha).is_integer() else cfg.alpha,
    "lora_dropout": cfg.dropout,
    "use_rslora": cfg.rank_stabilized,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    **writer.write(),
  }
  with new_directory(path) as temporary:
    write_json(temporary / CONFIG, config)
    safetensors.numpy.save_file(writer.tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    text = card_text(config, cfg, lora.count(params, constants), card)
    (temporary / "README.md").write_text(text, encoding="utf-8")
    if frozen is not None:
      alignment = _alignment(frozen, params, constants, base_names(frozen, model), taken)
      write_json(temporary / _FINGERPRINT, {"base_alignment": alignment})


# The fingerprint of the base.


def _alignment(
  frozen: Any, params: Any, constants: Any, names: Names, taken: Any = None
) -> dict[str, float]:
  """p = ⟨W, Δ⟩ / ‖Δ‖² of each adapted module, those without a Δ left out.

  Args:
    taken: what was taken out of W to make `frozen`, as `lora.taken_out` gives it.
  """
  flat, fixed = tree_paths.leaves(params), tree_paths.leaves(constants)
  start = tree_paths.leaves({} if taken is None else taken)
  found = {}
  for path, leaf in names.flat.items():
    layer = lora.module(path)
    if f"{layer}/lora_a" not in flat:
      continue
    w = lora.base_weight(frozen, path)
    a, b, scaling = flat[f"{layer}/lora_a"], flat[f"{layer}/lora_b"], fixed[f"{layer}/scaling"]
    for index, name in tensor_names(names.templates[path], leaf.shape):
      one, own_a, own_b = jax.tree.map(lambda x, index=index: x[index], (w, a, b))
      p = float(_projection(one, own_a, own_b, scaling[index[: scaling.ndim]]))
      if taken is not None:
        pair = (start[f"{layer}/{name}"][index] for name in ("lora_a", "lora_b"))
        p += float(_projection_of_product(*pair, own_a, own_b))
      if math.isfinite(p):
        found[name.removesuffix(".weight")] = p
  return found


@jax.jit
def _projection(w: Any, a: jax.Array, b: jax.Array, scaling: jax.Array) -> jax.Array:
  """⟨W, Δ⟩ / ‖Δ‖² of one matrix, NaN where Δ = 0; sums over r, so that Δ is never made."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  with jax.default_matmul_precision("highest"):
    projected = quantized_matmul(a.T, w) if is_quantized(w) else a.T @ w.astype(jnp.float32)
    square = _square(a, b)
  inner = (projected * b).sum()
  return jnp.where(scaling * square > 0, inner / (scaling * square), jnp.nan)


def _square(a: jax.Array, b: jax.Array) -> jax.Array:
  """‖A · B‖², 0 where it is no more than the rounding of parts that cancel each other."""
  terms = ((a.T @ a) @ b) * b
  square = terms.sum()
  return jnp.where(square > 1e-5 * jnp.abs(terms).sum(), square, 0)


@jax.jit
def _projection_of_product(a0: jax.Array, b0: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """⟨s · A₀B₀, Δ⟩ / ‖Δ‖² of Δ = s · AB, whatever s is."""
  with jax.default_matmul_precision("highest"):
    inner = (((a.T @ a0) @ b0) * b).sum()
    square = _square(a, b)
  return jnp.where(square > 0, inner / square, jnp.nan)


def _check_fingerprint(
  directory: Path, frozen: Any, params: Any, constants: Any, names: Names
) -> None:
  file = directory / _FINGERPRINT
  if not file.exists():
    return
  stored = read_json(file).get("base_alignment")
  if not isinstance(stored, dict):
    raise ValueError(f"{file}: base_alignment: {stored!r}; numbers by module are wanted")
  found = _alignment(frozen, params, constants, names)
  moved = np.asarray([found[name] - stored[name] for name in found if name in stored])
  if not moved.size:
    return
  # Of a tiny Δ the rounding of a quantized base is no small part: the median has to be clear of the
  # threshold by two standard errors.
  error = 1.25 * moved.std() / math.sqrt(moved.size)
  if np.median(moved) - 2 * error > _MERGED:
    raise ValueError(
      f"{directory}: the adapter is merged into this base already: along the adapter's own "
      f"directions its weights lie {np.median(moved):.2f} times the adapter away from those of the "
      "base it was trained on; open it on that one"
    )
