"""The grid of configs/ablate.py (alpha = 2 r), with INT4 with a zero-point, and 3 and 2 bits.

  python -m experiments.run --config configs/ablate_full.py --workdir runs/ablate

369 trials; in the directory of configs/ablate.py its 261 are finished and are not run again. Each
width has compiled programs of its own: the last 90 took 16 minutes on one core (measured, the other
one busy with other work; CPU, JAX 0.11.2).

The answer found here (held-out loss less that of 16-bit LoRA, the mean over ranks and block sizes,
with its standard error; the other seven are in configs/ablate.py):

  int4_zero_point .005 (.002)   nf3 .039 (.004)   nf2 .226 (.008)

nf2 is told apart from 16-bit LoRA (p = .008 after Holm's correction for the ten), and from nf3
(p = .029) and int4 (p = .034) in the table of all values. Three seeds separate neither nf3
(p = .085) nor INT4 with a zero-point (p = .44) from 16-bit LoRA.
"""

from configs import ablate


def get_config():
  """The same, so that the trials are the same ones."""
  return ablate.get_config()


def sweep():
  """Ten codebooks."""
  codebooks = (*ablate.CODEBOOKS, "int4_zero_point", "nf3", "nf2")
  return ablate.of(codebooks, ablate.at_their_rates())
