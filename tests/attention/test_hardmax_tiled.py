"""Tiles of hard-max attention against a scan of all keys."""

import functools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import hardmax_tiled, masks

T = 150


@functools.cache
def program(ties):
  def run(q, k, v, g):
    def loss(v):
      q_, k_, v_ = (x[None, :, None] for x in (q, k, v))
      out, winners = hardmax_tiled.attend(q_, k_, v_, masks.causal(), ties=ties)
      return (out[0, :, 0] * g).sum(), (out[0, :, 0], jax.tree.map(lambda x: x[0, :, 0], winners))

    (_, aux), dv = jax.value_and_grad(loss, has_aux=True)(v)
    return *aux, dv

  return jax.jit(run)


@pytest.mark.parametrize("family", hardmax_kit.FAMILIES)
@pytest.mark.parametrize("ties", ["average", "latest"])
def test_winners_values_and_gradients(family, ties):
  q, k = hardmax_kit.planar(family, T)
  v, g = np.random.default_rng(0).normal(size=(2, T, 3)).astype(np.float32)
  out, winners, dv = program(ties)(*(jnp.asarray(x) for x in (q, k, v, g)))
  expected = hardmax_kit.scan(q, k)
  np.testing.assert_array_equal(winners.score, expected.score)
  np.testing.assert_array_equal(winners.count, expected.count)
  np.testing.assert_array_equal(winners.last, expected.last)
  if ties == "latest":
    np.testing.assert_array_equal(out, v[expected.last])
    kit.assert_close("dv", dv, np.eye(T)[expected.last].T @ g)
  else:
    kit.assert_close("out", out, expected.average(v))
    kit.assert_close("dv", dv, expected.average_gradient(g))


def test_memory_is_linear():
  """For 8192 tokens, forward and backward, the compiler sets aside less than half a byte for each
  of the T^2 scores.
  """

  def loss(v, q, k):
    return hardmax_tiled.attend(q, k, v, masks.causal(), ties="average")[0].sum()

  inputs = (jax.ShapeDtypeStruct((1, 8192, 1, 2), jnp.float32),) * 3
  program = jax.jit(jax.grad(loss)).lower(*inputs).compile()
  assert program.memory_analysis().temp_size_in_bytes < 8192**2 / 2
