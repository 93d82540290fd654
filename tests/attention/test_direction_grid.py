"""The bound on what is lost, by keys that are easy and keys that are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import direction_grid
from attention.ops import hardmax

T = 200


def keys(family):
  rng = np.random.default_rng(0)
  k = rng.normal(size=(T, 3))
  if family == "sphere":
    k /= np.linalg.norm(k, axis=1, keepdims=True)
  elif family == "far":
    k += 100.0  # the distance of two keys counts, not their length
  elif family == "line":
    k = rng.normal(size=(T, 1)) * [[1.0, -2.0, 0.5]]
  return k.astype(np.float32)


@functools.cache
def program(cells):
  return jax.jit(functools.partial(hardmax.direction_grid_attention, cells=cells))


@pytest.mark.parametrize("family", ["gaussian", "sphere", "far", "line"])
def test_no_more_is_lost_than_the_bound_and_finer_grids_lose_less(family):
  k = keys(family)
  q = np.random.default_rng(1).normal(size=(T, 3)).astype(np.float32)
  q[3::17], q[5] = np.eye(3)[np.arange(3, T, 17) % 3], 0
  lost = {}
  for cells in (4, 16):
    out, index = program(cells)(*(jnp.asarray(x)[:, None] for x in (q, k, k)))
    index = np.asarray(index)[:, 0]
    np.testing.assert_array_equal(out[:, 0], k[index])
    assert (index <= np.arange(T)).all()
    wide = k.astype(np.float64)
    score = np.where(np.tri(T, dtype=bool), q.astype(np.float64) @ wide.T, -np.inf)
    regret = score.max(1) - score[np.arange(T), index]
    apart = np.linalg.norm(wide[score.argmax(1)] - wide[index], axis=1)
    rounding = 1e-6 * np.abs(q).sum(1) * np.abs(k).max()
    limit = direction_grid.error(cells) * np.linalg.norm(q, axis=1) * apart
    assert (regret <= limit + rounding).all()
    lost[cells] = (regret / np.maximum(np.linalg.norm(q, axis=1), 1e-9)).mean()
  assert lost[16] <= lost[4] / 2 + 1e-5


def test_a_direction_is_near_every_query():
  """The distance of unit vectors is below the bound, and comes near to it."""
  q = kit.normal(jax.random.key(0), 5000, 3)
  u = np.asarray(direction_grid.directions(5), np.float64)
  u = (u / np.linalg.norm(u, axis=1, keepdims=True))[np.asarray(direction_grid.cell(q, 5))]
  q = np.asarray(q, np.float64)
  apart = np.linalg.norm(q / np.linalg.norm(q, axis=1, keepdims=True) - u, axis=1)
  assert 0.8 * direction_grid.error(5) < apart.max() <= direction_grid.error(5)


def test_grouped_heads_and_other_widths():
  make = kit.keys()
  q, k = kit.normal(next(make), 2, 30, 4, 3), kit.normal(next(make), 2, 30, 2, 3)
  out, _ = program(4)(q, k, k)
  for n in range(4):
    alone, _ = program(4)(q[:, :, n : n + 1], *(k[:, :, n // 2 : n // 2 + 1],) * 2)
    kit.assert_same(f"head {n}", out[:, :, n], alone[:, :, 0])
  with pytest.raises(NotImplementedError, match="needs H = 3 and T = S, not 2, 30 and 30"):
    hardmax.direction_grid_attention(q[..., :2], k[..., :2], k)
