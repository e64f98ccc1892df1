"""The TPU's compiler, where there is no TPU: programs for a topology, and the schedules it made.

libtpu compiles for any generation on any machine. What it reports (memory, bytes, its own estimate
of the time) is of the program; nothing here has run on a TPU. With `keep_schedules`, called before
anything else of this module, it writes what it made of each kernel into a folder, of which
`schedule` reads the last step: the bundles, in the order in which they issue, and what each asks of
which unit.
"""

import atexit
import dataclasses
import functools
import importlib.util
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

# Of each generation, a topology that libtpu knows, of the fewest chips.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

_folder: Path | None = None


def unavailable() -> str | None:
  """Why nothing can be compiled for a TPU here, or None."""
  if importlib.util.find_spec("libtpu") is None:
    return "libtpu is not installed (pip install 'qlora_jax[tpu]')"
  return None


def keep_schedules() -> None:
  """From here on the compiler writes down its schedules.

  Raises:
    RuntimeError: it has started already.
  """
  global _folder
  if topology.cache_info().currsize:
    raise RuntimeError("keep_schedules: the compiler has started already")
  _folder = Path(tempfile.mkdtemp(prefix="qlora_jax_llo_"))
  atexit.register(shutil.rmtree, _folder, ignore_errors=True)
  flags = f"--xla_jf_dump_to={_folder} --xla_jf_dump_llo_text=true"
  os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"


@functools.cache
def topology(chip: str) -> tuple[Any, ...]:
  """The devices of a generation's topology: "v5e", "v5p", "v6e" or "v7x".

  Raises:
    RuntimeError: libtpu is not installed.
  """
  if reason := unavailable():
    raise RuntimeError(reason)
  # There is no TPU, nor a machine that would say what it has.
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices)


def one_chip(chip: str) -> jax.sharding.Mesh:
  """A mesh of a single device, its axis "x"."""
  return jax.sharding.Mesh(np.array(topology(chip)[:1]), ("x",))


def compile_for(mesh: jax.sharding.Mesh, function: Callable, *arguments: Any) -> Any:
  """`function` of arguments (arrays, or their shapes) compiled for the devices of a mesh.

  Those without a sharding are whole on each device.
  """
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def placed(leaf):
    sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or whole)

  # What is traced for, as `matmul.target` reads it.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(function).trace(*jax.tree.map(placed, arguments))
    return traced.lower(lowering_platforms=("tpu",)).compile()


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What the compiler made of a step of a kernel's grid.

  Attributes:
    bundles: of the longest run without a branch, which is the work of a step: what is done at the
      first or the last step alone is apart. Those that only wait count.
    units: what those bundles ask of each unit ("VALU", "XLU", "MATMUL", …), summed.
    slots: how much of each a bundle can hold.
  """

  bundles: int
  units: dict[str, int]
  slots: dict[str, int]


def schedule(kernel: str) -> Schedule:
  """Of the kernel of that name that was compiled last.

  Raises:
    RuntimeError: none was written.
  """
  if _folder is None:
    raise RuntimeError("schedule: keep_schedules was not called")
  name = re.compile(rf"(\d+)-{re.escape(kernel)}(\.\d+)?-\d+-final_bundles.txt")
  found = {int(m[1]): p for p in _folder.iterdir() if (m := name.fullmatch(p.name))}
  if not found:
    raise RuntimeError(f"schedule: no kernel {kernel!r} among what libtpu wrote")
  prefix = f"{max(found)}-{kernel}"
  slots, final = _utilization(prefix, "final")
  starts = [0, *_branch_targets(found[max(found)].read_text()), len(final)]
  first, last = max(itertools.pairwise(starts), key=lambda run: run[1] - run[0])
  # The final text leaves out bundles that only wait, for a product say: their time is in the table
  # before it alone. The runs are found there again by what was asked of units till then, those
  # apart that count as long as they are busy.
  _, rows = _utilization(prefix, "pre-delay")
  issued = [i for i, unit in enumerate(slots) if unit not in ("MXU", "XLU")]
  asked, before = (each[:, issued].sum(1).cumsum() for each in (final, rows))
  ends = np.searchsorted(before, [asked[first - 1] if first else -1, asked[last - 1]], "right")
  run = rows[ends[0] : ends[1]].sum(0)
  if (run[issued] != final[first:last, issued].sum(0)).any():
    raise RuntimeError(f"schedule: {kernel!r}: another order of bundles than libtpu 0.0.48's")
  return Schedule(
    bundles=int(ends[1] - ends[0]),
    units=dict(zip(slots, run.tolist(), strict=True)),
    slots=slots,
  )


def _utilization(prefix: str, stage: str) -> tuple[dict[str, int], np.ndarray]:
  """How much of each unit a bundle holds, and what each bundle asks of them, `[bundles, units]`."""
  assert _folder is not None
  (path,) = _folder.glob(f"{prefix}*-{stage}_hlo-static-per-bundle-utilization.txt")
  head, body = path.read_text().split("== UTILIZATION:")
  names, sizes = head.splitlines()[1:3]
  slots = dict(zip(map(str.strip, names.split(",")), map(int, sizes.split()), strict=True))
  return slots, np.array([[int(x) for x in line.split()] for line in body.strip().splitlines()])


def _branch_targets(text: str) -> list[int]:
  """The bundles at which a predicated region or a loop starts or ends."""
  places = re.findall(r"^ *(0x[0-9a-f]+|0) +(?:LH|LB|LE|PB|PF|CT): *>* *:? *", text, re.MULTILINE)
  return sorted({int(place, 16) for place in places})
