"""Score modifiers: the order of cap, bias and slope, and ALiBi's published slopes."""

import jax.numpy as jnp
import numpy as np
import pytest

from attention import scores
from attention.scores import Modifiers


def test_slopes_are_those_of_the_paper():
  np.testing.assert_allclose(scores.alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-7)
  np.testing.assert_allclose(scores.alibi_slopes(16)[:2], [2**-0.5, 2**-1.0], rtol=1e-6)
  # 12 heads: those of 8, then every other one of 16.
  exponents = [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]
  np.testing.assert_allclose(scores.alibi_slopes(12), 2.0 ** -np.array(exponents), rtol=1e-6)


@pytest.mark.parametrize("num_heads", [1, 3, 6, 12])
def test_slopes_fall_within_0_and_1(num_heads):
  slopes = np.asarray(scores.alibi_slopes(num_heads))
  assert slopes.shape == (num_heads,) and len(set(slopes.tolist())) == num_heads
  assert ((slopes > 0) & (slopes < 1)).all()


def test_cap_bounds_the_product_and_not_the_bias():
  product = jnp.full((1, 1, 1, 1, 2), 1e6)
  modifiers = Modifiers(jnp.full((1, 1, 1, 2), 100.0), jnp.array([2.0]))
  q_idx, k_idx = jnp.array([5], jnp.int32), jnp.array([5, 2], jnp.int32)
  out = scores.modify(product, modifiers, q_idx, k_idx, scale=0.5, logit_cap=30.0)
  np.testing.assert_allclose(out[0, 0, 0, 0], [130.0, 130.0 - 2.0 * 3], rtol=1e-6)


def test_heads_are_grouped_in_rows():
  """Query head n belongs to key head n // G, as in jax.nn."""
  x = jnp.arange(6.0).reshape(1, 6, 1, 1)
  np.testing.assert_array_equal(scores.grouped(x, 2)[0, :, :, 0, 0], [[0, 1, 2], [3, 4, 5]])
