"""The short convolution against loops in float64, with its gradients, segments and state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention.modules.convolution import ShortConvolution, causal_convolution, prefill


def f64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


def oracle(x, weight, segment_ids=None):
  x, weight = f64(x), f64(weight)
  B, T = x.shape[:2]
  segment_ids = np.zeros((B, T)) if segment_ids is None else np.asarray(segment_ids)
  out = np.zeros_like(x)
  for b in range(B):
    for t in range(T):
      for i in range(min(weight.shape[1], t + 1)):
        if (segment_ids[b, t - i : t] == segment_ids[b, t]).all():
          out[b, t] += weight[:, i] * x[b, t - i]
  return out


def draw(T, W, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  return kit.normal(keys[0], 3, T, 2, 4), kit.normal(keys[1], 2, W, 4)


@pytest.mark.parametrize("T", [1, 3, 11])
@pytest.mark.parametrize("W", [1, 4])
def test_equals_the_loops(T, W):
  x, weight = draw(T, W)
  np.testing.assert_allclose(causal_convolution(x, weight), oracle(x, weight), atol=2e-6)


def test_segments_do_not_see_each_other():
  x, weight = draw(11, 4)
  ids = jnp.array([[0] * 11, [0, 0, 1, 0, 0, 2, 2, 3, 3, 3, 0], [5] * 3 + [4] * 8])
  out = causal_convolution(x, weight, segment_ids=ids)
  np.testing.assert_allclose(out, oracle(x, weight, ids), atol=2e-6)


def test_gradients():
  """It is linear in each argument: a gradient times a direction is the value at the direction."""
  x, weight = draw(9, 4)
  dx, dweight = draw(9, 4, seed=1)
  ids = jnp.array([[0] * 9, [0, 0, 1, 1, 1, 2, 2, 2, 3], [7] * 9])
  cotangent = kit.normal(jax.random.key(2), *x.shape)
  loss = lambda x, weight: (cotangent * causal_convolution(x, weight, segment_ids=ids)).sum()
  got = jax.jit(jax.grad(loss, (0, 1)))(x, weight)
  c = f64(cotangent)
  pairs = {
    "x": ((got[0] * dx).sum(), (c * oracle(dx, weight, ids)).sum()),
    "weight": ((got[1] * dweight).sum(), (c * oracle(x, dweight, ids)).sum()),
  }
  for name, (value, want) in pairs.items():
    np.testing.assert_allclose(value, want, rtol=1e-4, err_msg=name)


def test_ragged_pieces_equal_the_whole():
  x, weight = draw(11, 4)
  whole = causal_convolution(x, weight)
  ends = np.array(
    [[0, 2, 7], [3, 3, 4], [1, 6, 11]]
  )  # three pieces; row b of them ends at ends[piece, b]
  ends = np.sort(ends, axis=0)
  state, start = jnp.zeros((3, 3, 2, 4)), np.zeros(3, int)
  for end in ends:
    lengths = end - start
    width = max(lengths.max(), 1)
    piece = np.full(
      (3, width, 2, 4), np.nan, np.float32
    )  # what lies beyond a row's length must not matter
    for b in range(3):
      piece[b, : lengths[b]] = x[b, start[b] : end[b]]
    state, out = prefill(state, jnp.asarray(piece), weight, lengths=jnp.asarray(lengths))
    for b in range(3):
      np.testing.assert_allclose(out[b, : lengths[b]], whole[b, start[b] : end[b]], atol=1e-6)
    start = end
  assert np.isfinite(state).all()


def test_begins_as_the_identity():
  x, _ = draw(5, 3)
  conv = ShortConvolution(3, 2, 4)
  np.testing.assert_array_equal(causal_convolution(x, conv.weight[...]), x)
  assert conv.init_state(7, jnp.dtype(jnp.bfloat16)).shape == (7, 2, 2, 4)
