"""The squares of causal attention, each against all of its scores."""

import itertools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import hardmax_levels

T = 128
LOWEST = hardmax_levels.WIDTH.bit_length() - 1


@jax.jit
def best_of_levels(q, k):
  """For each level and query a best key and the number of runs of keys tied with it, or -1."""

  def visit(found, level):
    ties = hardmax_levels.ties_of(level)
    runs = 1 + ties.edge.astype(jnp.int32) + (ties.other >= 0).astype(jnp.int32)
    new = jnp.stack([level.keys[level.best], runs], -1)
    return found.at[level.bits, level.queries].set(new)

  problem = hardmax_levels.make_problem(q, k, T)
  found = jnp.full((T.bit_length() - 1, T, 2), -1, jnp.int32)
  return hardmax_levels.fold(problem, visit, found, LOWEST)


@pytest.mark.parametrize("family", ["gaussian", "parabola", "grid", "collinear"])
def test_every_query_finds_its_best_key_on_every_level(family):
  q, k = hardmax_kit.planar(family, T)
  found = np.asarray(best_of_levels(jnp.asarray(q), jnp.asarray(k)))
  score = hardmax_kit.scores(q, k)
  for bits, t in itertools.product(range(LOWEST, T.bit_length() - 1), range(T)):
    left = (t >> bits) - 1 << bits
    best, runs = found[bits, t]
    if not t >> bits & 1:
      assert best == -1  # the left half of a block asks nobody here
    elif q[t, 1] != 0:
      assert left <= best < left + (1 << bits)
      most = score[t, left : left + (1 << bits)]
      # Rounding makes neighbors on a hull nearly equal; integers are exact.
      error = 0 if family != "gaussian" else 2e-7 * np.abs(most).max()
      assert most.max() - score[t, best] <= error
      distinct = np.unique(k[left : left + (1 << bits)][most == most.max()], axis=0)
      assert (runs == 1) == (len(distinct) == 1)


def test_sums_before():
  got = hardmax_levels.sums_before(jnp.arange(4, dtype=jnp.int32))
  np.testing.assert_array_equal(got, [0, 0, 1, 3, 6])
