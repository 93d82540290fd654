"""Paths down the trees that hulls are: what keys that share one must not lose."""

import hardmax_kit
import jax
import numpy as np
import pytest

from attention import hull

prefill = jax.jit(hull.prefill)


@pytest.mark.parametrize("slope", [(1, 1), (-1, 4), (3, 1), (1, -3)])
def test_lines_that_meet_in_a_point_all_count(slope):
  """Keys on a slanted line, in any order, asked across it: all tie, 30 of them and not one less.
  Only where float32 does not hold the slope, as of (1, -3), some are missed, and those read are
  still of the best.
  """
  rng, q = np.random.default_rng(3), np.array([slope], np.float32)
  along = rng.permutation(np.arange(-15, 15))[:, None] * np.array([[slope[1], -slope[0]]])
  k = (np.concatenate([along, -q]) + np.array([[5, -9]])).astype(np.float32)
  q, best = np.repeat(q, 31, axis=0), hardmax_kit.scan(np.repeat(q, 31, axis=0), k)
  v = np.stack([rng.integers(-50, 51, 31), (q * k).sum(1)], 1).astype(np.float32)
  state = hull.init_state(1, num_heads=1, num_kv_heads=1, value_dim=2, max_length=31)
  _, out = prefill(state, *(x[None, :, None] for x in (q, k, v)))
  np.testing.assert_allclose(out[0, :, 0, 1], best.score, 1e-6)
  if slope != (1, -3):
    np.testing.assert_allclose(out[0, :, 0], best.average(v), 1e-6, 1e-6)


def test_no_path_is_longer_than_33_nodes():
  """Keys whose lines meet at neighboring floats fill a path to its end, and are read."""
  x, gap = np.arange(400, dtype=np.float32), 2.0**-23
  k = np.stack([x, -np.cumsum(1 + x * gap)], 1).astype(np.float32)
  q = np.stack([1 + x * gap, np.ones_like(x)], 1).astype(np.float32)
  state = hull.init_state(
    1, num_heads=1, num_kv_heads=1, value_dim=1, max_length=400, ties="latest"
  )
  state, out = prefill(state, *(z[None, :, None] for z in (q, k, x[:, None])))
  for tree in np.asarray(state.nodes[:-5]).reshape(2, -1, 5):
    level, depth = [0], 0
    while level:
      level, depth = [child for node in level for child in tree[node, 3:] if child], depth + 1
    assert depth == 33
  assert hardmax_kit.relative_regret(q, k, np.asarray(out)[0, :, 0, 0].astype(int)) <= 2e-7
