"""What the tests of mixers share: a small model's mixer, its weights in float64, and the questions.

An oracle is a function of one row, [T D] -> [T D], in NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention.modules.config import DecoderConfig
from attention.variants import parse

CONFIG = DecoderConfig(
  vocab_size=8, num_layers=4, width=12, num_heads=2, head_dim=4, short_convolution=0
)


def make(name, *, layer=0, config=CONFIG):
  """The mixer of a mechanism, none of whose parameters is 0, 1 or the same twice."""
  mechanism = parse(name)[0]
  mixer = mechanism.mixer(config, mechanism, layer=layer, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(mixer, nnx.Param)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  moved = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
  return nnx.merge(graphdef, jax.tree.unflatten(tree, moved))


def f64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


def heads(x, projection) -> np.ndarray:
  """[T D] -> [T N H]."""
  return np.tensordot(x, f64(projection.kernel[...]), 1)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.log1p(np.exp(x))


def rms_norm(x, scale, axes=(-1,), epsilon=1e-6):
  return x / np.sqrt((x**2).mean(axes, keepdims=True) + epsilon) * f64(scale)


def convolved(x, weight) -> np.ndarray:
  """Each channel of [T N H] by its own filter [N W H], back in time."""
  out = np.zeros_like(x)
  for t in range(len(x)):
    for i in range(min(weight.shape[1], t + 1)):
      out[t] += f64(weight)[:, i] * x[t - i]
  return out


def recurrence(q, k, v, decay=None, *, normalized=False):
  """S_t = decay_t S_{t-1} + k_t v_t^T and q_t S_t, heads repeated as they are shared."""
  N = max(q.shape[1], v.shape[1])
  q, k, v = (np.stack([x[:, n * x.shape[1] // N] for n in range(N)], 1) for x in (q, k, v))
  decay = np.ones((*q.shape[:2], 1)) if decay is None else decay
  state, weight = np.zeros((N, q.shape[2], v.shape[2])), np.zeros((N, q.shape[2]))
  out = np.zeros_like(v)
  for t in range(len(q)):
    state = decay[t][..., None] * state + np.einsum("nm,nh->nmh", k[t], v[t])
    weight = decay[t] * weight + k[t]
    out[t] = np.einsum("nm,nmh->nh", q[t], state)
    if normalized:
      out[t] /= np.einsum("nm,nm->n", q[t], weight)[:, None]
  return out


def join(mixer, out) -> np.ndarray:
  """[T N h] -> [T D]."""
  return np.tensordot(out, f64(mixer.out.kernel[...]), 2)


def ask(mixer, oracle, *, T=11):
  """Equal to the oracle, whole and by ragged prefill and steps; documents alone; all learns."""
  x = jax.random.normal(jax.random.key(1), (2, T, CONFIG.width))
  want = np.stack([oracle(f64(row)) for row in x])
  graphdef, params = nnx.split(mixer, nnx.Param)

  def loss(params, x):
    out = nnx.merge(graphdef, params)(x)
    return jnp.sin(3 * out).sum(), out

  gradients, out = jax.jit(jax.grad(loss, has_aux=True))(params, x)
  np.testing.assert_allclose(out, want, atol=3e-5)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert float(jnp.abs(gradient).max()) > 1e-9, jax.tree_util.keystr(path)

  @jax.jit
  def decode(x, params):
    model, lengths, rows = nnx.merge(graphdef, params), jnp.array([7, 4]), jnp.arange(2)
    where = jnp.arange(7)[None].repeat(2, 0)
    state, first = model.prefill(model.init_state(2, T), x[:, :7], positions=where, lengths=lengths)
    steps = []
    for i in range(3):
      state, step = model.step(state, x[rows, lengths + i], positions=lengths + i)
      steps.append(step)
    return first, jnp.stack(steps, axis=1)

  first, steps = decode(x, params)
  for row, length in enumerate((7, 4)):
    np.testing.assert_allclose(first[row, :length], want[row, :length], atol=3e-5)
    np.testing.assert_allclose(steps[row], want[row, length : length + 3], atol=3e-5)

  ids = jnp.array([[0] * 5 + [1] * (T - 5), [0] * T], jnp.int32)
  where = jnp.stack([jnp.concatenate([jnp.arange(5), jnp.arange(T - 5)]), jnp.arange(T)])
  packed = jax.jit(lambda x: mixer(x, segment_ids=ids, positions=where))(x)
  alone = np.concatenate([oracle(f64(x[0, :5])), oracle(f64(x[0, 5:]))])
  np.testing.assert_allclose(packed, np.stack([alone, want[1]]), atol=3e-5)
