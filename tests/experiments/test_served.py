"""The README's table of implementations is the registry's."""

from pathlib import Path

import jax
import pytest

from experiments import served

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="kernels need JAX 0.11.2")
def test_the_readme_has_the_registry_s_table():
  assert served.table() in README.read_text()


def test_tables_a_column_are_xla_s_alone():
  answers = [served.answer("any4", *column[1:]) for column in served._COLUMNS]
  assert answers == ["no"] * (len(served._COLUMNS) - 1) + ["yes"]
