"""The gated MLP against numpy."""

import jax
import numpy as np
from flax import nnx

import kit
from attention.modules.config import DecoderConfig
from attention.modules.mlp import GatedMLP


def f64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


def test_formula():
  config = DecoderConfig(vocab_size=8, width=12, num_heads=2, mlp_width=20, num_layers=2)
  mlp = GatedMLP(config, rngs=nnx.Rngs(0))
  x = 3 * kit.normal(jax.random.key(1), 2, 5, 12)
  gate, up, down = (f64(p.kernel[...]) for p in (mlp.gate, mlp.up, mlp.down))
  gated = f64(x) @ gate
  want = (gated / (1 + np.exp(-gated)) * (f64(x) @ up)) @ down
  np.testing.assert_allclose(mlp(x), want, atol=5e-6)
  np.testing.assert_allclose(mlp(x[:, 0]), want[:, 0], atol=5e-6)
