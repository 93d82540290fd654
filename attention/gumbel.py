"""Gumbel noise that is a function of a query's own seed and of how far away a key is.

    g = -log(-log u),     argmax over s of (log p[s] + g[s]) is a draw from p

Gumbel 1954; the Gumbel-max trick, Maddison et al. 2014, https://arxiv.org/abs/1411.0030. As the
seed comes with the query and the key is named by its distance, a token draws the same in a packed
row and alone, in a long text at once and one token at a time, on one device and on many.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import tiles


def gumbel(noise: Float[Array, "*B T"], distance: Int[Array, "*#B T S"]) -> Float[Array, "*B T S"]:
  """Noise for the keys at `distance` from the queries whose seeds are the bits of `noise`, which is
  uniform between 0 and 1.

  float32, 24 bits: from -2.9 to 16.7, so what has less than 2^-24 of the probability is drawn
  seldom or never.
  """
  seed = lax.bitcast_convert_type(lax.stop_gradient(noise).astype(jnp.float32), jnp.int32)
  bits = tiles.random_bits(seed[..., None], jnp.zeros_like(distance), distance)
  u = (lax.shift_right_logical(bits, jnp.int32(8)).astype(jnp.float32) + 0.5) * 2.0**-24
  u = jnp.minimum(u, 1 - 2.0**-24)  # the last of these numbers would round to 1
  return -jnp.log(-jnp.log(u))
