"""What does not fit is refused with both sizes in one sentence."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import attention
import kit
from attention import masks, shapes


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


@pytest.mark.parametrize(
  "op",
  [
    attention.dot_product_attention,
    attention.hardmax_attention,
    lambda *inputs, mask: attention.top_k_attention(*inputs, mask, top_k=2)[0],
    functools.partial(attention.stochastic_attention, noise=None),
  ],
  ids=["softmax", "hardmax", "top_k", "stochastic"],
)
def test_every_op_takes_a_mask_that_fits_and_no_other(op):
  shapes_of = ((2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8))
  q, k, v = (kit.normal(jax.random.key(i), *shape) for i, shape in enumerate(shapes_of))
  ids = masks.segments(jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 5), jnp.int32))
  with pytest.raises(ValueError, match=r"query_ids of the mask .* = \[2, 3\], not \[2, 4\]"):
    op(q, k, v, mask=ids)
  with pytest.raises(ValueError, match=r"mask must broadcast .*\[2, 4, 3, 5\], not \[3, 3, 5\]"):
    op(q, k, v, mask=jnp.ones((3, 3, 5), bool))
  for rows in (jnp.ones((3, 1), bool), jnp.ones((1, 5), bool).at[0, 3].set(False)):
    whole = jnp.broadcast_to(rows, (3, 5))
    kit.assert_close("rows", op(q, k, v, mask=rows), op(q, k, v, mask=whole))


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
