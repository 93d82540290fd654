"""The arithmetic that ties depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import plane

OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""What conftest.py turns off: where nothing is optimized, nothing is contracted either."""


@pytest.mark.parametrize("H", [1, 2, 9])
def test_scores_are_numpys_bit_for_bit(H):
  """No fused multiply-add, by a compiler that makes them where it can."""
  make = kit.keys()
  q, k = kit.normal(next(make), 40, H), kit.normal(next(make), 70, H)
  qn, kn = np.asarray(q), np.asarray(k)
  expected = qn[:, None, 0] * kn[None, :, 0]
  for c in range(1, H):
    expected = expected + qn[:, None, c] * kn[None, :, c]
  run = jax.jit(plane.scores, compiler_options=OPTIMIZED)
  kit.assert_same("scores", run(q, k), expected)
  kit.assert_same("beside a NaN", run(q.at[0, 0].set(jnp.nan), k)[1:], expected[1:])
  if H == 2:  # else `score` could be simpler
    plain = lambda q, k: q[:, None, 0] * k[None, :, 0] + q[:, None, 1] * k[None, :, 1]
    contracted = np.asarray(jax.jit(plain, compiler_options=OPTIMIZED)(q, k))
    assert (contracted != expected).mean() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ordered_bits_keep_the_order_and_return(dtype):
  x = np.array(
    [-np.inf, -3e38, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3e38, np.inf], dtype
  )
  with kit.double():
    bits = plane.ordered_bits(jnp.asarray(x))
    assert (np.diff(np.asarray(bits).astype(object)) > 0).all()
    kit.assert_same("returned", plane.from_ordered_bits(bits), x)


def test_directions_point_up():
  x, y = (jnp.asarray(v, jnp.float32) for v in ([3, 3, -2, -2, 0, 0], [1, -2, 0, -0.0, 0, 5]))
  d = plane.direction(x, y)
  assert d.lower.tolist() == [False, True, False, False, False, False]
  assert d.axis.tolist() == [False, False, True, True, True, False]
  assert d.slope.tolist() == [3.0, -1.5, np.inf, np.inf, np.inf, 0.0]
  assert (d.y[~np.asarray(d.axis)] > 0).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_no_compiler_can_know_is_zero_for_all_bits(dtype):
  """Which is of the last three alone: of NaN, of infinity and of numbers."""
  with kit.double():
    kind = plane._UNSIGNED[jnp.dtype(dtype).itemsize]
    ends = np.array([[0], [np.asarray(np.nan, dtype).view(kind)]], kind)
    x = (ends + np.arange(8, dtype=kind)).astype(kind).view(dtype).reshape(-1)
    assert np.isnan(x).any() and not np.asarray(jax.vmap(plane._hidden_zero)(jnp.asarray(x))).any()
