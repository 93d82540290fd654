"""Residuals and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

import kit
from attention.modules.block import Block, dropout
from attention.modules.config import DecoderConfig
from attention.variants import parse


def test_two_residuals():
  config = DecoderConfig(vocab_size=8, width=12, num_heads=2)
  block = Block(config, parse("linear")[0], rngs=nnx.Rngs(0))
  x = kit.normal(jax.random.key(1), 2, 5, 12)
  mixed = x + block.mixer(block.mixer_norm(x))
  np.testing.assert_array_equal(block(x), mixed + block.mlp(block.mlp_norm(mixed)))
  np.testing.assert_array_equal(block(x, dropout_key=jax.random.key(0)), block(x))  # rate 0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean(rate):
  x = jnp.ones((100, 300))
  out = dropout(x, rate, jax.random.key(0))
  assert set(np.unique(out)) == {0.0, np.float32(1 / (1 - rate))}
  assert abs(float((out == 0).mean()) - rate) < 0.01
  np.testing.assert_array_equal(out, dropout(x, rate, jax.random.key(0)))
  assert (out != dropout(x, rate, jax.random.key(1))).any()
  assert dropout(x, rate, None) is x


def test_dropout_does_not_depend_on_the_mesh():
  x, key = jnp.ones((8, 16)), jax.random.key(0)
  want = dropout(x, 0.3, key)
  with jax.set_mesh(jax.make_mesh((2, 2), ("data", "sequence"))):
    got = jax.jit(lambda x, key: dropout(x, 0.3, key))(
      jax.device_put(x, P("data", "sequence")), key
    )
    assert jax.typeof(got).sharding.spec == P("data", "sequence")
  np.testing.assert_array_equal(got, want)


def test_a_block_drops_both_branches():
  config = DecoderConfig(vocab_size=8, width=12, num_heads=2, dropout=0.9)
  block = Block(config, parse("linear")[0], rngs=nnx.Rngs(0))
  x = kit.normal(jax.random.key(1), 2, 50, 12)
  kept = block(x, dropout_key=jax.random.key(0)) == x  # both branches dropped: 0.81 of them
  assert 0.75 < float(kept.mean()) < 0.87
