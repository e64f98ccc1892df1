"""How fast, and in how much memory, a checkpoint is read, quantized, saved and opened again.

  python -m experiments.bench.load --model llama-8b --directory /tmp/load --out load.json [--peer]

A checkpoint of that shape with random weights is written into the directory first. Files are
dropped from the page cache before each reading, so that the disk is read. `--peer` has transformers
with bitsandbytes load the same files, where they are installed. The disk's own speed (one thread,
sequential) and the copy's from host to device stand beside.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, int]] = {
  "llama-8b": {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
  },
  # Two layers of 1 GB tensors.
  "two-layers": {
    "vocab_size": 256,
    "hidden_size": 16384,
    "intermediate_size": 32768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 128,
  },
  "tiny": {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
  },
}

PEER = """
import json, sys, time
import torch, transformers
torch.ones(1, device="cuda")
start = time.monotonic()
model = transformers.AutoModelForCausalLM.from_pretrained(
  sys.argv[1], dtype=torch.bfloat16, device_map={"": 0},
  quantization_config=transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16))
torch.cuda.synchronize()
import bitsandbytes
print(json.dumps({"seconds": time.monotonic() - start, "transformers": transformers.__version__,
  "bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}))
"""


def write_checkpoint(directory: Path, fields: dict[str, int]) -> int:
  """Writes a Llama of this shape, bf16, a file a layer; returns its bytes."""
  import ml_dtypes
  import numpy as np
  import safetensors.numpy

  from qlora_jax.hf.files import new_directory, write_json
  from qlora_jax.hf.tensors import INDEX

  d, i = fields["hidden_size"], fields["intermediate_size"]
  h = fields.get("head_dim", d // fields["num_attention_heads"])
  q, kv = fields["num_attention_heads"] * h, fields["num_key_value_heads"] * h
  shapes = {
    "self_attn.q_proj": (q, d),
    "self_attn.k_proj": (kv, d),
    "self_attn.v_proj": (kv, d),
    "self_attn.o_proj": (d, q),
    "mlp.gate_proj": (i, d),
    "mlp.up_proj": (i, d),
    "mlp.down_proj": (d, i),
    "input_layernorm": (d,),
    "post_attention_layernorm": (d,),
  }
  rng = np.random.default_rng(0)
  # One draw for all: what is measured does not depend on the values.
  noise = (rng.standard_normal(1 << 24, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
  files: dict[str, str] = {}
  total = 0
  with new_directory(directory) as temporary:

    def write(file: str, named: dict[str, tuple[int, ...]]) -> None:
      nonlocal total
      tensors = {name: np.resize(noise, shape) for name, shape in named.items()}
      safetensors.numpy.save_file(tensors, temporary / file, metadata={"format": "pt"})
      files.update(dict.fromkeys(named, file))
      total += sum(x.nbytes for x in tensors.values())

    for layer in range(fields["num_hidden_layers"]):
      prefix = f"model.layers.{layer}."
      write(f"layer-{layer}.safetensors", {f"{prefix}{n}.weight": s for n, s in shapes.items()})
    v = fields["vocab_size"]
    rest = {
      "model.embed_tokens.weight": (v, d),
      "lm_head.weight": (v, d),
      "model.norm.weight": (d,),
    }
    write("rest.safetensors", rest)
    write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    config = {
      "model_type": "llama",
      "architectures": ["LlamaForCausalLM"],
      "dtype": "bfloat16",
      "torch_dtype": "bfloat16",
      "rms_norm_eps": 1e-5,
      "rope_theta": 500000.0,
      "max_position_embeddings": 8192,
      **fields,
    }
    write_json(temporary / "config.json", config)
  return total


def drop_from_cache(directory: Path) -> None:
  """Makes the next reading come from the disk."""
  for file in directory.iterdir():
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_all(directory: Path) -> int:
  """Reads the files from end to end, and returns their bytes."""
  buffer, total = bytearray(16 << 20), 0
  for file in sorted(directory.glob("*.safetensors")):
    with open(file, "rb", buffering=0) as handle:
      while count := handle.readinto(buffer):
        total += count
  return total


def anonymous_bytes() -> int:
  """Of this process, now: memory that is not a mapped file's."""
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def watched(work: Callable[[], Any]) -> tuple[Any, float, int]:
  """What `work` gives, its seconds, and how far anonymous memory rose meanwhile."""
  before, peak, done = anonymous_bytes(), 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.005):
      peak = max(peak, anonymous_bytes())

  thread = threading.Thread(target=watch)
  thread.start()
  start = time.monotonic()
  try:
    result = work()
  finally:
    seconds = time.monotonic() - start
    done.set()
    thread.join()
  return result, seconds, peak - before


def main(argv: Sequence[str]) -> int:
  """Measures what `argv` asks for, and writes the JSON."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", choices=MODELS, default="tiny")
  parser.add_argument("--directory", type=Path, required=True)
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--peer", action="store_true")
  arguments = parser.parse_args(argv)

  import jax
  import numpy as np

  from qlora_jax import QuantizationConfig, hf

  source, packed = arguments.directory / arguments.model, arguments.directory / "packed"
  if not source.exists():
    write_checkpoint(source, MODELS[arguments.model])
  device = jax.devices()[0]
  host = np.ones(64 << 20, np.uint8)
  jax.device_put(host).block_until_ready()
  start = time.monotonic()
  for _ in range(16):
    jax.device_put(host).block_until_ready()
  copy = 16 * host.nbytes / (time.monotonic() - start)

  drop_from_cache(source)
  start = time.monotonic()
  total = read_all(source)
  disk = total / (time.monotonic() - start)

  def load(path: Path, *rules: Any) -> tuple[Any, float, int]:
    def work() -> Any:
      model, frozen = hf.load(path, *rules)
      return model, jax.block_until_ready(frozen)

    drop_from_cache(path)
    return watched(work)

  results: dict[str, Any] = {
    "command": f"python -m experiments.bench.load {' '.join(argv)}",
    "device": device.device_kind,
    "jax": jax.__version__,
    "python": platform.python_version(),
    "checkpoint_bytes": total,
    "disk_bytes_per_second": disk,
    "copy_bytes_per_second": copy,
  }
  for name in ("first", "compiled"):
    (model, frozen), seconds, peak = load(source, QuantizationConfig())
    size = sum(x.nbytes for x in jax.tree.leaves(frozen))
    results[f"quantize_{name}"] = {
      "seconds": seconds,
      "bytes_per_second": total / seconds,
      "share_of_slower": total / seconds / min(disk, copy),
      "peak_anonymous_bytes": peak,
      "packed_bytes": size,
    }
    if name == "first":
      del model, frozen
  start = time.monotonic()
  hf.save_base(packed, model, frozen)
  results["save_seconds"] = time.monotonic() - start
  del model, frozen
  (_, frozen), seconds, peak = load(packed)
  results["open"] = {"seconds": seconds, "peak_anonymous_bytes": peak}
  stats = device.memory_stats() or {}
  results["device_peak_bytes"] = stats.get("peak_bytes_in_use")
  results["largest_tensor_bytes"] = max(
    2 * MODELS[arguments.model][a] * MODELS[arguments.model]["hidden_size"]
    for a in ("intermediate_size", "vocab_size")
  )
  del frozen
  if arguments.peer:
    drop_from_cache(source)

    result = subprocess.run(
      [sys.executable, "-c", PEER, str(source)], capture_output=True, text=True, check=False
    )
    lines = result.stdout.strip().splitlines()
    results["peer"] = json.loads(lines[-1]) if lines else {"failed": result.stderr[-800:]}
  arguments.out.write_text(json.dumps(results, indent=2) + "\n")
  print(json.dumps(results, indent=2))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
