"""The map of design.md, enforced: a module imports only from its own layer and the layers above.

"Above" is the order of the table: the numbers are at the top and know nothing of the rest.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_jax

# Every module stands here, so a new one fails a test until it has a place. "x.*" is a package and
# all that is in it. `qlora_jax` itself is the package's surface: the numbers, op and adapters.
LAYERS = {
  "numbers": [
    "deprecations",
    "traced_for",
    "block_optimal",
    "codebooks",
    "tree_paths",
    "fingerprint",
    "truncated_svd",
    "quantized_tensor",
    "rotation",
    "quantization",
    "row_lookup",
    "gptq",
    "bit_budget",
  ],
  "op": ["matmul.*"],
  "adapters": [
    "lora",
    "lora_init",
    "adapted_product",
    "weight_uses",
    "packed_evaluation",
    "importing",
    "einsum_layer",
    "",
  ],
  "layers": ["linen", "nnx"],
  "models": ["models.*"],
  "hf": ["hf.*"],
  "training": [
    "config",
    "sweeps",
    "data",
    "synthetic",
    "losses",
    "optimizers",
    "optimizer_state",
    "sharding",
    "calibration",
    "checkpoints",
    "metrics",
    "environment",
    "train",
    "trial_groups",
    "evaluate",
    "generate",
    "memory",
    "plan",
  ],
}
ORDER = list(LAYERS)

# What each layer may import from elsewhere: nothing but the standard library, JAX and NumPy at the
# top; flax, optax and orbax only from the layers down.
NUMERICS = {"jax", "jaxlib", "numpy"}
FRAMEWORKS = {"flax", "optax", "orbax"}

ROOT = Path(qlora_jax.__file__).parent


def module_name(path: Path) -> str:
  """`matmul.api` for qlora_jax/matmul/api.py, `matmul` for the package, "" for the root."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def layer_of(module: str) -> str | None:
  for layer, entries in LAYERS.items():
    for entry in entries:
      package = entry.removesuffix(".*")
      if module == package or (entry.endswith(".*") and module.startswith(package + ".")):
        return layer
  return None


def imports(source: str, module: str, modules=MODULES) -> Iterator[tuple[int, str]]:
  """(line, imported module) of every import, lazy ones too, but for those of type checkers."""

  def resolve(name: str) -> str:
    inside = name.removeprefix("qlora_jax").removeprefix(".")
    return f"qlora_jax.{inside}".rstrip(".") if name.split(".")[0] == "qlora_jax" else name

  def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
      for child in node.orelse:
        yield from visit(child)
      return
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, resolve(alias.name)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{module}, line {node.lineno}: a relative import; write it in full"
      assert node.module is not None
      for alias in node.names:
        inside = f"{node.module}.{alias.name}".removeprefix("qlora_jax.")
        # `from qlora_jax import lora` imports the module, not the package's surface.
        is_module = node.module.split(".")[0] == "qlora_jax" and inside in modules
        yield node.lineno, resolve(f"qlora_jax.{inside}" if is_module else node.module)
    for child in ast.iter_child_nodes(node):
      yield from visit(child)

  yield from visit(ast.parse(source))


def violations(source: str, module: str, modules=MODULES) -> Iterator[str]:
  layer = layer_of(module)
  assert layer is not None, f"{module}: stands in no layer; add it to LAYERS in {__file__}"
  depth = ORDER.index(layer)
  for line, imported in imports(source, module, modules):
    top = imported.split(".")[0]
    where = f"qlora_jax.{module}, line {line}: {layer} imports {imported}"
    if top == "qlora_jax":
      target = layer_of(imported.removeprefix("qlora_jax").removeprefix("."))
      if target is None:
        yield f"{where}, which stands in no layer"
      elif ORDER.index(target) > depth:
        yield f"{where}, which is below it, in {target}"
    elif top in FRAMEWORKS and depth < ORDER.index("layers"):
      yield f"{where}; that is for `layers` and below"
    elif top in {"experiments", "configs", "tests"}:
      yield f"{where}; the library is used by it"
    elif depth < ORDER.index("layers") and top not in NUMERICS | sys.stdlib_module_names:
      yield f"{where}; down to the adapters jax and numpy are enough"


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_above(module):
  assert not list(violations(MODULES[module].read_text(), module))


@pytest.mark.parametrize(
  ("module", "source", "complaint"),
  [
    ("codebooks", "import numpy as np\nimport jax.numpy as jnp\nimport math", None),
    ("codebooks", "from qlora_jax import lora", "numbers imports qlora_jax.lora, which is below"),
    ("codebooks", "import qlora_jax as ql", "numbers imports qlora_jax, which is below it"),
    ("codebooks", "from qlora_jax import quantize", "numbers imports qlora_jax, which is below"),
    ("codebooks", "def f():\n  import flax", "line 2: numbers imports flax; that is for `layers`"),
    ("codebooks", "import scipy.stats", "imports scipy.stats; down to the adapters"),
    ("lora", "from qlora_jax.matmul import api", None),
    ("lora", "from qlora_jax.matmul.api import f", None),
    ("lora", "if TYPE_CHECKING:\n  from qlora_jax import linen", None),
    ("lora", "try:\n  import optax\nexcept ImportError: pass", "adapters imports optax"),
    ("linen", "import flax.linen as nn\nfrom qlora_jax import lora", None),
    ("linen", "from qlora_jax.hf.files import x", "imports qlora_jax.hf.files, which is below"),
    ("train", "from qlora_jax import metrics, config", None),
    ("train", "from experiments import run", "training imports experiments; the library is"),
    ("train", "from qlora_jax.utils import x", "qlora_jax.utils, which stands in no layer"),
  ],
)
def test_the_check_itself(module, source, complaint):
  names = {"", "lora", "linen", "matmul", "matmul.api", "metrics", "config", "hf", "hf.files"}
  modules = dict.fromkeys(names, Path())
  found = list(violations(source, module, modules))
  assert len(found) == (complaint is not None)
  assert complaint is None or complaint in found[0]


def test_the_surface_needs_jax_and_numpy_alone():
  program = """
import sys
import qlora_jax as ql
ql.quantize, ql.quantized_matmul, ql.lora.init, ql.codebooks.names
heavy = {"flax", "optax", "orbax", "ml_collections", "tokenizers", "safetensors", "tensorboardX"}
sys.exit(", ".join(heavy & sys.modules.keys()) or 0)
"""
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr
