"""Others' code mixes dtypes and ranks: JAX's standard modes here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield
