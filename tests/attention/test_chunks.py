"""Decays inside a chunk against sums in float64, where float32 differences would have no digits
left.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import chunks

C = 16
DECAYS = {
  "none": np.zeros((C, 3)),
  "gentle": -np.random.default_rng(0).uniform(0, 0.1, (C, 3)),
  "strong among weak": np.where(np.arange(C)[:, None] % 5 == 2, -1e4, -1e-3) * np.ones((1, 3)),
  "a reset": np.where(np.arange(C)[:, None] == 7, -np.inf, -0.5) * np.ones((1, 3)),
}


def _between(g):
  """The sum of g over j+1..i, term by term: [C C ...]; -inf above the diagonal."""
  out = np.full((C, *g.shape), -np.inf)
  for i in range(C):
    for j in range(i + 1):
      out[i, j] = g[j + 1 : i + 1].sum(0)
  return out


@pytest.mark.parametrize("name", DECAYS)
def test_sums_are_exact(name):
  g = DECAYS[name]
  decays = jax.jit(lambda g: jax.tree.map(jnp.exp, chunks.decay_sums(g)))
  prefix, suffix, total = (np.asarray(x) for x in decays(jnp.asarray(g, jnp.float32)))
  for i in range(C):
    kit.assert_close(f"prefix {i}", prefix[i], np.exp(g[: i + 1].sum(0)))
    kit.assert_close(f"suffix {i}", suffix[i], np.exp(g[i + 1 :].sum(0)))
  kit.assert_close("total", total[0], np.exp(g.sum(0)))
  between = jax.jit(chunks.decay_between)(jnp.asarray(g[:, :1], jnp.float32))
  kit.assert_close("between", jnp.exp(between), np.exp(_between(g)[..., 0]))


@pytest.mark.parametrize("name", DECAYS)
def test_scores_per_channel_and_their_gradients(name):
  g = DECAYS[name]
  make = kit.keys()
  q, k = (kit.normal(next(make), C, 3) for _ in range(2))
  weights = np.exp(_between(g))
  expected = np.einsum("im,jm,ijm->ij", *(np.asarray(x, np.float64) for x in (q, k)), weights)

  def total(q, k, g):
    scores = chunks.decayed_scores(q, k, g)
    return scores.sum(), scores

  run = jax.jit(jax.grad(total, has_aux=True))
  gradient, scores = run(q, k, jnp.asarray(g, jnp.float32))
  kit.assert_close("scores", scores, expected)
  kit.assert_close("dq", gradient, np.einsum("jm,ijm->im", np.asarray(k, np.float64), weights))


def test_masks_of_runs():
  starts = jnp.array([[0, 0, 1, 0], [0, 0, 0, 0]], bool)
  runs = chunks.number_runs(starts)
  np.testing.assert_array_equal(runs, [[0, 0, 1, 1], [0, 0, 0, 0]])
  masks = chunks.run_masks(runs, jnp.array([0, 3], jnp.int32))
  np.testing.assert_array_equal(masks.entering[:, 0, :, 0], [[1, 1, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(masks.leaving[:, 0, :, 0], [[0, 0, 1, 1], [1, 1, 1, 1]])
  np.testing.assert_array_equal(masks.whole[:, 0, 0, 0], [0, 0])
  np.testing.assert_array_equal(masks.same[0, 0, 2], [0, 0, 1, 1])
