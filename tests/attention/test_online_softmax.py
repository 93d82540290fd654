"""The running softmax: parts in any order give the whole, whatever the size of the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import online_softmax


def _whole(scores, v):
  scores, v = np.asarray(scores, np.float64), np.asarray(v, np.float64)
  m = scores.max(-1, keepdims=True)
  p = np.exp(scores - np.where(np.isinf(m), 0.0, m))
  total = p.sum(-1, keepdims=True)
  with np.errstate(divide="ignore"):
    lse = (np.where(np.isinf(m), 0.0, m) + np.log(total))[..., 0]
  return p @ v / np.where(total == 0.0, 1.0, total), lse


def _parts(scores, v, cuts):
  state = online_softmax.start(scores.shape[:-1], v.shape[-1])
  for first, last in zip((0, *cuts), (*cuts, scores.shape[-1]), strict=True):
    state = online_softmax.update(state, scores[:, first:last], v[first:last], "ts,sh->th")
  return online_softmax.finish(state)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("cuts", [(), (1,), (3, 7, 8)])
def test_parts_give_the_whole(size, cuts):
  make = kit.keys()
  scores, v = kit.normal(next(make), 5, 11) * size, kit.normal(next(make), 11, 3)
  out, lse = _parts(scores, v, cuts)
  expected = _whole(scores, v)
  kit.assert_close("out", out, expected[0])
  kit.assert_close("lse", lse, expected[1])


def test_empty_rows_and_empty_parts():
  scores = jnp.full((3, 4), -jnp.inf).at[1, 2].set(5.0).at[2, 0].set(-3e38)
  v = jnp.arange(8.0).reshape(4, 2)
  out, lse = _parts(scores, v, (2,))
  np.testing.assert_array_equal(out, [[0, 0], [4, 5], [0, 1]])
  np.testing.assert_array_equal(lse, np.float32([-np.inf, 5.0, -3e38]))


def test_merge_of_halves_is_the_whole():
  make = kit.keys()
  scores = kit.normal(next(make), 6, 10) * 30
  scores = scores.at[0, :5].set(-jnp.inf).at[1, 5:].set(-jnp.inf).at[2].set(-jnp.inf)
  v = kit.normal(next(make), 10, 3)
  halves = [_parts(scores[:, i], v[i], ()) for i in (slice(0, 5), slice(5, 10))]
  out, lse = online_softmax.merge(*halves)
  expected = _whole(scores, v)
  kit.assert_close("out", out, expected[0])
  kit.assert_close("lse", lse, expected[1])


def test_merge_has_gradients_where_a_side_is_empty():
  out, lse = jnp.ones((1, 2)), jnp.array([-jnp.inf])
  loss = lambda a: sum(x.sum() for x in online_softmax.merge(a, (out, jnp.zeros(1))))
  gradient = jax.grad(loss)((out, lse))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
