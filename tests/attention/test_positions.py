"""Rotary positions: only distances matter, lengths stay, the table is the paper's."""

import jax.numpy as jnp
import numpy as np

import kit
from attention import rotary


def test_products_depend_on_distance_only():
  make = kit.keys()
  q, k = (kit.normal(next(make), 1, 1, 1, 16) for _ in range(2))

  def product(t, s):
    at = lambda x, p: rotary(x, jnp.array([[p]], jnp.int32))
    return float((at(q, t) * at(k, s)).sum())

  for distance in (0, 1, 7, 100):
    values = [product(s + distance, s) for s in (0, 3, 1000)]
    np.testing.assert_allclose(values, values[0], atol=2e-4)
  assert abs(product(5, 0) - product(0, 5)) > 1e-3  # the direction of time is seen


def test_rotation_by_hand():
  """R = 2: one pair, angle = position."""
  x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
  np.testing.assert_allclose(
    rotary(x, jnp.array([[3]], jnp.int32))[0, 0, 0], [np.cos(3), np.sin(3)], rtol=1e-6
  )


def test_fraction_leaves_the_rest_alone():
  x = kit.Case(H=10).inputs()[0]
  positions = jnp.arange(33, dtype=jnp.int32)[None]
  out = rotary(x, positions, fraction=0.5)
  kit.assert_same("rest", out[..., 4:], x[..., 4:])
  kit.assert_close("norm", jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1))
  kit.assert_same("position 0", out[:, 0], x[:, 0])
  kit.assert_close("rotated", out[..., :4], rotary(x[..., :4], positions))


def test_a_fraction_that_is_no_binary_number_rotates_all_its_channels():
  """0.58 of 100 is 58, though the product of the doubles is 57.99..."""
  x, positions = jnp.ones((1, 2, 1, 100)), jnp.arange(2, dtype=jnp.int32)[None]
  turned = np.asarray(rotary(x, positions, base=100.0, fraction=0.58) != x)[0, 1, 0]
  np.testing.assert_array_equal(turned, np.arange(100) < 58)
