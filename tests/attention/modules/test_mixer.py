"""The mixer against float64 loops: grouped heads, rotary, segments."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kit
from attention.modules.config import DecoderConfig
from attention.modules.mixer import Attention
from attention.variants import parse


def f64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


CONFIG = DecoderConfig(vocab_size=8, width=12, num_heads=4, num_kv_heads=2, head_dim=6)


def turn(x, positions):
  """Rotary by complex numbers: channel c and c + H/2 are one number."""
  half = x.shape[-1] // 2
  angle = np.asarray(positions)[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], axis=-1)


def oracle(mixer, x, segment_ids, positions):
  """One row: [T D] -> [T D]."""
  wq, wk, wv, wo = (f64(p.kernel[...]) for p in (mixer.query, mixer.key, mixer.value, mixer.out))
  x = f64(x)
  q = turn(np.einsum("td,dnh->tnh", x, wq), positions)
  k = turn(np.einsum("td,dnh->tnh", x, wk), positions)
  v = np.einsum("td,dnh->tnh", x, wv)
  out = np.zeros_like(q)
  for t in range(len(x)):
    seen = [s for s in range(t + 1) if segment_ids[s] == segment_ids[t]]
    for n in range(q.shape[1]):
      scores = k[seen, n // 2] @ q[t, n] / np.sqrt(q.shape[-1])
      weights = np.exp(scores - scores.max())
      out[t, n] = weights @ v[seen, n // 2] / weights.sum()
  return np.einsum("tnh,nhd->td", out, wo)


def test_softmax_attention_from_scratch():
  mixer = Attention(CONFIG, parse("softmax")[0], rngs=nnx.Rngs(0))
  x = 2 * kit.normal(jax.random.key(1), 2, 9, 12)
  ids = np.array([[0] * 9, [3, 3, 1, 1, 1, 1, 2, 2, 2]])
  positions = np.array([np.arange(9), [0, 1, 0, 1, 2, 3, 0, 1, 2]])
  want = np.stack([oracle(mixer, *row) for row in zip(x, ids, positions, strict=True)])
  run = jax.jit(lambda ids, positions=None: mixer(x, segment_ids=ids, positions=positions))
  np.testing.assert_allclose(run(ids, positions), want, atol=5e-6)
  # Rotary sees distances alone: positions need not start again in each segment.
  np.testing.assert_allclose(run(ids), want, atol=5e-6)


def test_convolutions_are_where_the_formula_says():
  """A convolution that delays by one token makes the keys and values of the token before."""
  config = DecoderConfig(vocab_size=8, width=12, num_heads=2, short_convolution=2)
  plain = Attention(config, parse("linear")[0], rngs=nnx.Rngs(0))
  delayed = nnx.clone(plain)
  for conv in delayed.convolutions:
    conv.weight[...] = jnp.zeros_like(conv.weight[...]).at[:, 1].set(1.0)
  x = kit.normal(jax.random.key(1), 1, 7, 12)
  shifted = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
  np.testing.assert_allclose(jax.jit(delayed)(x), jax.jit(plain)(shifted), atol=1e-6)
