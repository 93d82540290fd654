"""Linear maps against numpy, and the scale that they are born with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kit
from attention.modules.projections import Projection


def f64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


@pytest.mark.parametrize(
  ("inputs", "outputs", "equation"),
  [((5,), (7,), "btd,de->bte"), ((5,), (2, 3), "btd,dnh->btnh"), ((2, 3), (5,), "btnh,nhd->btd")],
)
def test_sums_over_the_inputs(inputs, outputs, equation):
  names = (None,) * (len(inputs) + len(outputs))
  layer = Projection(inputs, outputs, names, rngs=nnx.Rngs(0))
  x = kit.normal(jax.random.key(1), 2, 4, *inputs)
  want = np.einsum(equation, f64(x), f64(layer.kernel[...]))
  np.testing.assert_allclose(layer(x), want, atol=1e-6)
  np.testing.assert_allclose(layer(x[0, 1]), want[0, 1], atol=1e-6)  # any number of axes before
  assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert layer.kernel.dtype == jnp.float32


def test_keeps_the_variance():
  layer = Projection((8, 64), (300,), (None,) * 3, rngs=nnx.Rngs(0))
  x = kit.normal(jax.random.key(1), 200, 8, 64)
  assert abs(float(layer(x).std()) - 1) < 0.05
  half = Projection((8, 64), (300,), (None,) * 3, scale=0.5, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(half.kernel[...], 0.5 * layer.kernel[...], rtol=1e-6)
