"""The report's statistics against NumPy, SciPy, simulation, and values known by hand."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments import statistics


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 101])
@pytest.mark.parametrize("t", [0.0, 0.3, -1.0, 2.5, 12.0])
def test_t_two_sided(t, degrees):
  expected = 2 * scipy.stats.t.sf(abs(t), degrees)
  assert statistics.t_two_sided(t, degrees) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_t_two_sided_of_infinity():
  assert statistics.t_two_sided(math.inf, 2) == pytest.approx(0, abs=1e-12)


def test_holm():
  assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert statistics.holm([0.9, 0.8]) == [1, 1]
  assert statistics.holm([]) == []


def scipy_spearman(x, y) -> float:
  return scipy.stats.spearmanr(x, y)[0]  # pyright: ignore[reportReturnType, reportArgumentType]


def test_ranks_and_spearman():
  x, y = [3.0, 1.0, 3.0, 8.0, -2.0], [1.0, 1.0, 5.0, 4.0, 0.0]
  assert statistics.ranks(x).tolist() == scipy.stats.rankdata(x).tolist()
  assert statistics.spearman(x, y) == pytest.approx(scipy_spearman(x, y))
  assert statistics.spearman([1, 1, 1], [1, 2, 3]) is None


def test_spearman_p():
  x = np.arange(7.0)
  # 2 of the 5040 orders are as extreme.
  assert statistics.spearman_p(x, x, draws=20_000) == pytest.approx(2 / 5040, abs=5e-4)
  y = np.array([2.0, 0, 1, 4, 3, 6, 5])
  exact = scipy.stats.permutation_test(
    (x,),
    lambda x: scipy_spearman(x, y),
    permutation_type="pairings",
    n_resamples=math.factorial(7),
  ).pvalue
  assert statistics.spearman_p(x, y, draws=20_000) == pytest.approx(exact, abs=0.005)
  assert statistics.spearman_p(x, [3, 3, 3, 3, 3, 3, 3]) == 1


def test_pareto():
  cost, loss = [3, 1, 2, 2, 4, 1], [1.0, 5.0, 2.0, 1.5, 1.0, 5.0]
  assert statistics.pareto(cost, loss) == [1, 3, 0]


def test_ratio_of_one_column_is_the_t_test():
  differences = np.array([[0.3], [0.1], [0.5], [0.2]])
  found = statistics.ratio(differences, np.ones((1, 1)))
  assert found.value == pytest.approx(differences.mean())
  assert found.error == pytest.approx(differences.std(ddof=1) / 2)
  assert found.p == pytest.approx(scipy.stats.ttest_1samp(differences[:, 0], 0)[1], rel=2e-5)


def test_ratio_of_one_seed_has_the_error_of_the_text():
  losses, targets = np.array([[4.0, 9.0, 2.0, 7.0]]), np.array([2.0, 3.0, 1.0, 2.0])
  found = statistics.ratio(losses, targets)
  residual = losses[0] - 22 / 8 * targets
  assert found.value == 22 / 8
  assert found.error == pytest.approx(residual.std(ddof=1) * 2 / 8)  # √4 / Σ targets
  assert found.p is None
  assert math.isnan(statistics.ratio(np.ones((1, 1)), np.ones((1, 1))).error)


def test_ratio_of_what_does_not_vary():
  assert statistics.ratio(np.zeros((3, 4)), np.ones(4)).p == 1
  assert statistics.ratio(np.ones((3, 4)), np.ones(4)).p == pytest.approx(0, abs=1e-12)


def normal_losses(generator, seeds, sequences):
  """Of a grid with a part of each seed, of each sequence, and of their own; the mean is 1."""
  parts = [(seeds, 1), (1, sequences), (seeds, sequences)]
  scales = (0.1, 0.5, 0.5)
  losses = np.ones((seeds, sequences))
  for part, scale in zip(parts, scales, strict=True):
    losses += scale * generator.normal(size=part)
  return losses


def test_the_error_is_that_of_repetitions():
  generator = np.random.default_rng(0)
  found = [statistics.ratio(normal_losses(generator, 6, 50), np.ones(50)) for _ in range(800)]
  scatter = np.std([each.value for each in found])
  claimed = math.sqrt(np.mean([each.error**2 for each in found]))
  # The text and the seeds: .1² / 6 + .5² / 50 + .5² / 300, of which the last is counted twice.
  assert scatter == pytest.approx(math.sqrt(0.0075), rel=0.1)
  assert claimed == pytest.approx(math.sqrt(0.00833), rel=0.05)


def test_the_error_of_a_quotient_is_that_of_repetitions():
  generator = np.random.default_rng(1)

  def once():
    won = normal_losses(generator, 5, 60)
    return statistics.ratio(won, won / 2 + normal_losses(generator, 5, 60))

  found = [once() for _ in range(600)]
  claimed = math.sqrt(np.mean([each.error**2 for each in found]))
  scatter = np.std([each.value for each in found])
  assert np.mean([each.value for each in found]) == pytest.approx(1 / 1.5, rel=0.02)
  assert 0.9 * scatter < claimed < 1.3 * scatter


def test_two_sided_of_one_part_is_student_s_t():
  for t, degrees in [(0.0, 2), (0.1, 2), (3.0, 2), (1e5, 2), (2.0, 154), (6.0, 154), (1.0, 1)]:
    expected = 2 * scipy.stats.t.sf(t, degrees)
    assert statistics.two_sided(-3 * t, [9.0], [degrees]) == pytest.approx(expected, rel=2e-5)
  assert statistics.two_sided(1e9, [1.0], [2]) == pytest.approx(statistics.LEAST_P)


@pytest.mark.parametrize("p", [0.3, 0.05, 0.05 / 84, 1e-9])
def test_two_sided_adds_the_squares_of_the_parts_quantiles(p):
  variances, degrees = [0.3, 1.7], [2, 154]
  t = scipy.stats.t.isf(p / 2, degrees)
  value = math.sqrt(float(np.square(t) @ variances))
  assert statistics.two_sided(value, variances, degrees) == pytest.approx(p, rel=2e-5)


@pytest.mark.parametrize("comparisons", [1, 84])
@pytest.mark.parametrize("share", [0.05, 0.9])
def test_the_test_holds_the_level_that_holm_asks_for(share, comparisons):
  """Of three seeds and 155 sequences; the seeds have a `share` of the variance."""
  generator, level = np.random.default_rng(2), 0.05 / comparisons
  draws = 30_000 if comparisons == 1 else 300_000
  seeds = generator.normal(size=(draws, 3)) * math.sqrt(3 * share)
  value = seeds.mean(1) + generator.normal(size=draws) * math.sqrt(1 - share)
  variances = np.stack(
    [seeds.var(1, ddof=1) / 3, (1 - share) * generator.chisquare(154, draws) / 154], axis=1
  )
  # By the normal distribution p is smaller: what it does not reject need not be looked at.
  near = np.flatnonzero(np.square(value) > scipy.stats.norm.isf(level / 2) ** 2 * variances.sum(1))
  p = [statistics.two_sided(value[i], variances[i].tolist(), [2, 154]) for i in near]
  rejected = np.sum(np.array(p) < level) / draws
  assert rejected < level  # Satterthwaite's degrees: 1.0 and 22 times the level of 84
  if comparisons == 1:
    assert rejected > 0.6 * level


def test_the_seeds_count_as_three_where_they_are_what_varies():
  generator = np.random.default_rng(4)
  losses = generator.normal(size=(800, 3, 1)) + 0.01 * generator.normal(size=(800, 3, 40))
  p = [statistics.ratio(each, np.ones(40)).p for each in losses]
  of_means = scipy.stats.ttest_1samp(losses.mean(2), 0, axis=1)[1]
  assert p == pytest.approx(of_means, abs=0.01)


def test_a_difference_that_every_seed_and_sequence_shows_is_found():
  """At 3 seeds, corrected for 100 comparisons: 8 standard errors, of the text alone."""
  generator = np.random.default_rng(5)
  differences = 0.1 * generator.normal(size=(1, 100)) + 0.001 * generator.normal(size=(3, 100))
  found = statistics.ratio(differences + 0.08, np.ones(100))
  assert found.p is not None and 100 * found.p < 1e-3


def test_bootstrap():
  generator = np.random.default_rng(3)
  wide = [normal_losses(generator, 20, 50) for _ in range(150)]
  intervals = [statistics.bootstrap(each, np.ones(50), draws=400) for each in wide]
  covered = np.mean([each is not None and each[0] < 1 < each[1] for each in intervals])
  assert 0.88 < covered < 0.99
  assert intervals[0] == statistics.bootstrap(wide[0], np.ones(50), draws=400)
  assert statistics.bootstrap(wide[0][:1], np.ones(50)) is None
  # Of a single column: the quantiles of the mean of resampled seeds.
  few = np.array([[0.0], [1.0], [2.0]])
  assert statistics.bootstrap(few, np.ones((1, 1))) == (0, 2)
