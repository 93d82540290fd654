"""Decays per channel inside a chunk of a TPU's kernels, as plain arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import kit
from pallas_kernels import linear_tpu_channel


def _faded(q, k, g):
  """(q, k, pairs, fade) from differences of running sums, which float64 can afford."""
  total = jnp.cumsum(g, 0)
  between = total[:, None] - total[None]
  between = jnp.where(jnp.tri(len(q), dtype=bool)[..., None], between, -jnp.inf)
  pairs = jnp.einsum("im,jm,ijm->ij", q, k, jnp.exp(between))
  return q * jnp.exp(total), k * jnp.exp(total[-1:] - total), pairs, jnp.exp(total[-1:])


def test_a_chunk_and_its_gradients_at_every_decay():
  make = kit.keys()
  q, k = (jax.random.normal(next(make), (128, 8)) for _ in range(2))
  g = jax.random.choice(next(make), jnp.array([0.0, -1e-3, -0.3, -30.0, -128.0]), (128, 8))
  g = g.at[:, :4].set(-0.02)
  run = functools.partial(linear_tpu_channel.faded, dtype=jnp.float32)
  shapes = jax.eval_shape(run, q, k, g)
  ones = jax.tree.map(lambda x: jax.random.normal(next(make), x.shape), shapes)

  @jax.jit
  def both(*given):
    found, pull = jax.vjp(run, *given)
    return found, pull(ones)

  found, gradients = both(q, k, g)
  with kit.double():
    x, given = kit.to_double((q, k, g)), kit.to_double(ones)
    want, want_pull = jax.vjp(_faded, *x)
    want_gradients = want_pull(tuple(given))
  kit.assert_trees_close(tuple(found), want)
  kit.assert_trees_close(gradients, want_gradients)


def test_the_state_pass_writes_what_the_chunk_does():
  make = kit.keys()
  k = jax.random.normal(next(make), (128, 8))
  g = -jnp.exp(jax.random.normal(next(make), (128, 8)))
  whole = jax.jit(lambda k, g: linear_tpu_channel.faded(k, k, g, jnp.float32))(k, g)
  keys, fade = jax.jit(linear_tpu_channel.written)(k, g)
  kit.assert_close("keys", keys, whole.k)
  kit.assert_close("fade", fade, whole.fade)
  assert np.asarray(fade).max() < 1
