"""Softmax over a few retrieved keys, with the gradient of the function that it is.

    out[t] = sum_{s in C[t]} p[t, s] v[s],     p[t, .] = softmax over C[t] of scale q[t] . k[s]

C[t] are the `top_k` keys of the greatest scores. They jump from one set to another on a set of
measure zero; between, they are constants, so the gradient is that of a softmax over gathered keys.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention import plane
from attention.masks import Mask

_ROWS = 2**22
"""Scores held at once while candidates are retrieved."""


def retrieve(
  q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: Mask, *, top_k: int, scale: float
) -> tuple[Int[Array, "B T N C"], Float[Array, "B T N"]]:
  """The best keys of every query, -1 where there is none, and the log-sum-exp of all its scores.

  O(T S) time, a few rows of scores at a time. No gradient.
  """
  q, k = lax.stop_gradient((q, k))
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  top_k = min(top_k, S)
  block = max(1, min(T, _ROWS // (B * N * S)))
  count = -(-T // block)
  padded = jnp.pad(q, ((0, 0), (0, count * block - T), (0, 0), (0, 0)))
  blocks = padded.reshape(B, count, block, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
  keys = k.swapaxes(1, 2)[:, :, None]
  k_idx = jnp.arange(S, dtype=jnp.int32)

  def one(x):
    i, q = x
    q_idx = i * block + jnp.arange(block, dtype=jnp.int32)
    seen = mask(q_idx, k_idx)
    seen = seen[:, None] if seen.shape[1] == 1 else seen.reshape(-1, K, N // K, block, S)
    s = jnp.where(seen, plane.scores(q, keys), -jnp.inf) * scale
    best, index = lax.top_k(s, top_k)
    m = jnp.maximum(best[..., :1], jnp.finfo(s.dtype).min)
    lse = m[..., 0] + jnp.log(jnp.exp(s - m).sum(-1))
    return jnp.where(best > -jnp.inf, index, -1), lse

  index, lse = lax.map(one, (jnp.arange(count, dtype=jnp.int32), blocks))
  index = index.transpose(1, 0, 4, 2, 3, 5).reshape(B, count * block, N, top_k)[:, :T]
  return index, lse.transpose(1, 0, 4, 2, 3).reshape(B, count * block, N)[:, :T]


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K h"],
  mask: Mask,
  *,
  top_k: int,
  scale: float,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
  """The output, float32 or float64, and the part of the whole softmax that was retrieved."""
  dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  index, lse = retrieve(q, k, mask, top_k=top_k, scale=scale)
  return softmax_over(q, k, v, index, lse, scale=scale)


def softmax_over(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K h"],
  index: Int[Array, "B T N C"],
  lse: Float[Array, "B T N"] | None = None,
  *,
  scale: float,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
  """Softmax over given candidates, all different, -1 for none; and the part of the softmax over all
  keys that they hold, if its log-sum-exp is given (else 1 where there is a candidate).
  """
  B, _, N, _ = q.shape
  K = k.shape[2]
  rows = jnp.arange(B)[:, None, None, None]
  heads = (jnp.arange(N) // (N // K))[:, None]
  at = (rows, jnp.maximum(index, 0), heads)
  none = index < 0
  s = jnp.where(none, -jnp.inf, (q[..., None, :] * k[at]).sum(-1) * scale)
  m = lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), jnp.finfo(s.dtype).min))
  p = jnp.where(none, 0.0, jnp.exp(s - m))
  total = p.sum(-1, keepdims=True)
  out = (p / jnp.where(total > 0, total, 1.0))[..., None] * v[at]
  found = m[..., 0] + jnp.log(jnp.where(total > 0, total, 1.0))[..., 0]
  mass = jnp.ones_like(found) if lse is None else jnp.exp(jnp.minimum(found - lse, 0.0))
  mass = jnp.where(total[..., 0] > 0, mass, 0.0).astype(jnp.float32)
  return out.sum(-2), lax.stop_gradient(mass)
