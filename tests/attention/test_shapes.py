"""What does not fit is refused with both sizes in one sentence."""

import re

import jax.numpy as jnp
import pytest

from attention import shapes


def arrays(query, key, value, dtype=jnp.float32):
  return jnp.zeros(query, dtype), jnp.zeros(key, dtype), jnp.zeros(value, dtype)


@pytest.mark.parametrize(
  ("given", "says"),
  [
    (((5, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8)), r"all be \[B, T, N, H\] or all \[T, N, H\]"),
    (((1, 5, 4, 8), (1, 5, 2, 8), (1, 6, 2, 8)), "batch, length and heads: .*5, 2, 8.*6, 2, 8"),
    (((1, 5, 4, 8), (1, 5, 2, 9), (1, 5, 2, 9)), "batch and head width: .*4, 8.*2, 9"),
    (((1, 5, 4, 8), (1, 5, 3, 8), (1, 5, 3, 8)), "divide query heads: N=4, K=3"),
  ],
)
def test_what_does_not_fit(given, says):
  with pytest.raises(ValueError, match=says):
    shapes.batched(*arrays(*given))


def test_a_batch_axis_is_added_and_dtypes_must_be_one_floating_kind():
  q, k, v = shapes.batched(*arrays((5, 4, 8), (6, 2, 8), (6, 2, 3)))
  assert (q.shape, k.shape, v.shape) == ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 3))
  with pytest.raises(ValueError, match="one floating dtype, not int32"):
    shapes.batched(*arrays((5, 4, 8), (5, 2, 8), (5, 2, 8), jnp.int32))
  with pytest.raises(ValueError, match="all have four axes"):
    shapes.agree(*arrays((5, 4, 8), (5, 2, 8), (5, 2, 8)))


def test_lengths_are_an_integer_a_row():
  assert shapes.row_lengths(None, 3, 5).tolist() == [5, 5, 5]
  found = shapes.row_lengths(jnp.array([1, 0, 5], jnp.uint8), 3, 5)
  assert found.dtype == jnp.int32 and found.tolist() == [1, 0, 5]
  for wrong in (jnp.array([1, 2]), jnp.array(3), jnp.ones((3, 1), jnp.int32), jnp.ones(3)):
    says = rf"integers of shape \[3\], not {wrong.dtype}{re.escape(str(list(wrong.shape)))}"
    with pytest.raises(ValueError, match=says):
      shapes.row_lengths(wrong, 3, 5)


def test_four_axes_of_one_or_all():
  assert shapes.broadcastable("mask", jnp.ones((5, 1)), (2, 4, 5, 6)).shape == (1, 1, 5, 1)
  with pytest.raises(ValueError, match=r"bias must broadcast.*\[2, 4, 5, 6\], not \[3, 5, 6\]"):
    shapes.broadcastable("bias", jnp.ones((3, 5, 6)), (2, 4, 5, 6))
