"""The maths of a tile against automatic differentiation, dropout's bits against statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from pallas_kernels import tiles


def _natural(product, bias, slope, distance, scale, cap):
  score = product * scale
  score = score if cap is None else cap * jnp.tanh(score / cap)
  return score + bias - slope * distance


@pytest.mark.parametrize("cap", [None, 3.0])
def test_scores_and_their_gradient(cap):
  make = kit.keys()
  product, bias, ds = (kit.normal(next(make), 24, 40) * 5 for _ in range(3))
  q_idx, k_idx = (jax.lax.broadcasted_iota(jnp.int32, (24, 40), axis) for axis in (0, 1))
  distance, slope = tiles.distance(q_idx, k_idx), jnp.float32(0.3)
  score2, tanh = tiles.scores(
    product, scale=0.2, logit_cap=cap, bias=bias, slope=slope, distance=distance
  )
  want, pull = jax.vjp(lambda x: _natural(x, bias, slope, distance, 0.2, cap), product)
  kit.assert_close("score", score2 * tiles.LN_2, want)
  kit.assert_close("gradient", tiles.d_product(ds, tanh, scale=0.2), pull(ds)[0])
  kit.assert_close("distance", distance, np.abs(np.arange(24)[:, None] - np.arange(40)[None]))


def test_a_probability_times_its_rise_is_the_softmax_gradient():
  make = kit.keys(1)
  s, dp = (kit.normal(next(make), 5, 9) for _ in range(2))
  p, pull = jax.vjp(jax.nn.softmax, s)
  kit.assert_close("ds", tiles.d_scores(p, dp, (p * dp).sum(-1, keepdims=True)), pull(dp)[0])


def test_an_empty_rows_maximum_is_finite():
  np.testing.assert_array_equal(tiles.finite(jnp.array([-jnp.inf, -3.0, 0.0, 2.0])), [0, -3, 0, 2])


def _kept(seed, T, S, rate, first=(0, 0)):
  q_idx = first[0] + jax.lax.broadcasted_iota(jnp.int32, (T, S), 0)
  k_idx = first[1] + jax.lax.broadcasted_iota(jnp.int32, (T, S), 1)
  return np.asarray(tiles.keep(jnp.int32(seed), q_idx, k_idx, rate=rate))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_in_all_and_in_each_row_and_column(rate):
  kept = _kept(7, 512, 512, rate)
  for name, mean, count in (("all", kept.mean(), kept.size), ("row", kept.mean(1), 512),
                            ("column", kept.mean(0), 512)):  # fmt: skip
    sigma = np.sqrt(rate * (1 - rate) / count)
    assert (np.abs(mean - (1 - rate)) < 4.5 * sigma).all(), name


def test_dropout_of_neighbours_and_of_seeds_is_independent():
  """Correlations of 2^18 pairs stay within what chance allows (five sigma)."""
  a, b = (_kept(seed, 512, 512, 0.5).astype(float) * 2 - 1 for seed in (3, 4))
  limit = 5 / np.sqrt(a.size)
  for name, x, y in (
    ("seeds", a, b), ("rows", a[1:], a[:-1]), ("columns", a[:, 1:], a[:, :-1]),
    ("diagonals", a[1:, 1:], a[:-1, :-1]), ("mirror", a, a.T * (1 - np.eye(512))),
  ):  # fmt: skip
    assert abs((x * y).mean()) < limit, name


def test_dropout_knows_positions_and_not_tiles():
  whole = _kept(11, 64, 96, 0.3)
  np.testing.assert_array_equal(_kept(11, 16, 32, 0.3, (16, 64)), whole[16:32, 64:96])
  assert _kept(11, 4, 4, 0.0).all()
