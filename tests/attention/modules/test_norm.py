"""RMSNorm against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import kit
from attention.modules.norm import RMSNorm


def oracle(x, scale, epsilon=1e-6):
  x = np.asarray(x, np.float64)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * np.asarray(scale, np.float64)


def test_formula_on_any_rank_and_size():
  norm = RMSNorm(6)
  norm.scale[...] = jnp.linspace(-1.0, 2.0, 6)
  for shape, size in [((6,), 1.0), ((3, 6), 1e-3), ((2, 5, 4, 6), 1e4)]:
    x = size * kit.normal(jax.random.key(0), *shape)
    np.testing.assert_allclose(norm(x), oracle(x, norm.scale[...]), rtol=2e-6)


def test_over_several_axes_it_is_over_all_their_elements():
  norm = RMSNorm(3, 6)
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 6))
  flat = oracle(x.reshape(2, 5, 18), np.ones(18)).reshape(x.shape)
  np.testing.assert_allclose(norm(x), flat, rtol=2e-6)


def test_bfloat16_keeps_its_dtype_and_float32_statistics():
  x = (300 * kit.normal(jax.random.key(1), 4, 512)).astype(jnp.bfloat16)
  out = RMSNorm(512)(x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(out, np.float64), oracle(x.astype(jnp.float32), np.ones(512)), rtol=4e-3
  )


def test_a_row_of_zeros_gives_zeros_and_a_finite_gradient():
  norm = RMSNorm(4)
  value, gradient = jax.value_and_grad(lambda x: norm(x).sum())(jnp.zeros((2, 4)))
  assert value == 0
  assert np.isfinite(gradient).all()
