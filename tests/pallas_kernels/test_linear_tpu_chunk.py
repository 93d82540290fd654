"""One reading of a chunk for both kinds of decays."""

import jax
import jax.numpy as jnp

import kit
from pallas_kernels import linear_tpu_chunk, linear_tpu_tiles


def test_decays_per_token_are_decays_per_channel_that_are_alike():
  make = kit.keys()
  q, k = (jax.random.normal(next(make), (128, 128)) / 8 for _ in range(2))
  g = jax.nn.log_sigmoid(jax.random.normal(next(make), (128, 1)))

  @jax.jit
  def both(q, k, g):
    rows = linear_tpu_tiles.numbers(g[None], 1, 128, 1, 1.0, 0.0)[0, 0, 0]
    decays = linear_tpu_tiles.exponents(rows), jnp.broadcast_to(g, q.shape)
    return [
      (tuple(linear_tpu_chunk.faded(q, k, x, jnp.float32)), linear_tpu_chunk.written(k, x))
      for x in decays
    ]

  token, channel = both(q, k, g)
  kit.assert_trees_close(token, channel)
