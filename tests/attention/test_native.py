"""What loops over single numbers write, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import native


@pytest.mark.parametrize("token", [0, 3, 5])
def test_entries_of_a_new_token(token):
  """Its own row, and each earlier one that it merged with, once. Beyond the capacity of 5 nobody's
  row is written, the last one.
  """
  rng = np.random.default_rng(token)
  old, new = rng.normal(size=(6, 3, 2)).astype(np.float32), rng.normal(size=(3, 2))
  new = new.astype(np.float32)
  merged = np.array([[-1, -1], [1, 1], [2, 0]]) if token else np.full((3, 2), -1)
  got = jax.jit(native.entered)(jnp.asarray(old).reshape(-1), jnp.int32(token), new, merged)
  want = old.copy()
  want[token] = new
  for head, entries in enumerate(merged):
    for entry in {*entries} - {-1}:
      want[entry, head] += new[head]
  np.testing.assert_array_equal(np.asarray(got).reshape(6, 3, 2)[:5], want[:5])


def test_numbers_are_added_or_put():
  """The last one is nobody's, and 0 after that."""
  array, new = jnp.arange(8.0), jnp.array([10.0, 20.0, 30.0])

  def program(fresh):
    rows = native.add(native.unwritten(array, 1), jnp.int32(2), new, 1, jnp.int32(2), fresh)
    return native.add(rows, jnp.int32(4), new, 0, jnp.int32(0), fresh).written()

  np.testing.assert_array_equal(jax.jit(program)(False), [0, 1, 22, 33, 4, 5, 6, 0])
  np.testing.assert_array_equal(jax.jit(program)(True), [0, 1, 20, 30, 4, 5, 6, 0])


def test_bits_and_back():
  x = jnp.array([0.0, -0.0, 1.5, -np.inf])
  np.testing.assert_array_equal(native.bits(x), np.asarray(x).view(np.int32))
  np.testing.assert_array_equal(native.floats(native.bits(x)), x)
