"""The grid of configs/ablate.py (alpha = 2 r), with INT4 with a zero-point, and 3 and 2 bits.

  python -m experiments.run --config configs/ablate_full.py --workdir runs/ablate

369 trials; in the directory of configs/ablate.py its 261 are finished and are not run again. Each
width has compiled programs of its own: about 11 minutes more on 2 idle cores (estimated, as there).
The answer found here: not run as a whole yet.
"""

from configs import ablate


def get_config():
  """The same, so that the trials are the same ones."""
  return ablate.get_config()


def sweep():
  """Ten codebooks."""
  codebooks = (*ablate.CODEBOOKS, "int4_zero_point", "nf3", "nf2")
  return ablate.of(codebooks, ablate.at_their_rates())
