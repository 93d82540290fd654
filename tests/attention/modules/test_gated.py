"""The gated mixer against the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention.modules.config import DecoderConfig
from attention.modules.gated import GatedAttention
from attention.variants import parse


def f64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


CONFIG = DecoderConfig(vocab_size=8, width=12, num_heads=2, head_dim=5)


def build():
  mixer = GatedAttention(CONFIG, parse("gated_linear")[0], rngs=nnx.Rngs(0))
  mixer.decay_bias[...] = jax.random.normal(jax.random.key(5), (2, 5)) - 2.0
  mixer.norm.scale[...] = jnp.linspace(0.5, 1.5, 5)
  return mixer


def oracle(mixer, x):
  """One row: [T D] -> [T D]."""
  w = {
    name: f64(getattr(mixer, name).kernel[...])
    for name in ("query", "key", "value", "out", "gate", "decay_down", "decay_up")
  }
  x, bias = f64(x), f64(mixer.decay_bias[...])
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  heads = lambda name: np.einsum("td,dnh->tnh", x, w[name])
  q, k, v, gate = heads("query"), heads("key"), heads("value"), heads("gate")
  alpha = sigmoid(np.einsum("tr,rnh->tnh", x @ w["decay_down"], w["decay_up"]) + bias) ** (1 / 16)
  state, out = np.zeros((2, 5, 5)), np.zeros_like(v)
  for t in range(len(x)):
    for n in range(2):
      state[n] = alpha[t, n][:, None] * state[n] + np.outer(k[t, n], v[t, n])
      o = q[t, n] @ state[n]
      o = o / np.sqrt((o**2).mean() + 1e-6) * f64(mixer.norm.scale[...])
      out[t, n] = gate[t, n] * sigmoid(gate[t, n]) * o
  return np.einsum("tnh,nhd->td", out, w["out"])


def test_equals_the_recurrence():
  mixer = build()
  x = jax.random.normal(jax.random.key(1), (2, 11, 12))
  np.testing.assert_allclose(mixer(x), np.stack([oracle(mixer, row) for row in x]), atol=2e-5)


def test_decays_are_never_positive():
  x = 1e4 * jax.random.normal(jax.random.key(2), (2, 7, 12))
  decay = build().inputs(x.astype(jnp.bfloat16))["log_decay"]
  assert decay.shape == (2, 7, 2, 5)
  assert decay.dtype == jnp.float32
  assert np.isfinite(decay).all()
  assert (decay <= 0).all()


def test_every_parameter_learns():
  graphdef, params = nnx.split(build(), nnx.Param)
  x = jax.random.normal(jax.random.key(3), (2, 6, 12))
  gradients = jax.grad(lambda p: jnp.sin(3 * nnx.merge(graphdef, p)(x)).sum())(params)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert float(jnp.abs(gradient).max()) > 0, jax.tree_util.keystr(path)
