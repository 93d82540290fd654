"""What linear-attention kernels are given: how much a decay forgets, and a normalized output."""

import jax
import jax.numpy as jnp
import numpy as np

import kit
from pallas_kernels.linear import FORGET, Normalized


def test_forgetting_is_exact():
  """What `FORGET` promises, on this chip."""
  assert np.exp(np.float32(FORGET)) == 0 == float(jnp.exp(jnp.float32(FORGET)))


def test_a_normalized_output_has_these_derivatives():
  """Of x and w in o = x / w, with o = 0 and no derivative where w is 0."""
  make = kit.keys()
  x, d_out = kit.normal(next(make), 2, 5, 3, 4), kit.normal(next(make), 2, 5, 3, 4)
  weight = kit.normal(next(make), 2, 3, 5).at[0, 1, 2].set(0.0)

  def divide(x, weight):
    w = weight.swapaxes(1, 2)[..., None]
    return jnp.where(w == 0, 0.0, x / jnp.where(w == 0, 1.0, w))

  out, pull = jax.vjp(divide, x, weight)
  dx, d_weight = pull(d_out)
  found = Normalized.of(out, weight, d_out)
  kit.assert_close("dx", d_out * found.inverse.swapaxes(1, 2)[..., None], dx)
  kit.assert_close("dw", -found.inverse * found.delta, d_weight)
  assert found.inverse[0, 1, 2] == found.delta[0, 1, 2] == 0
