"""Softmax over a few retrieved keys, with the gradient of the function that it is.

    out[t] = sum_{s in C[t]} p[t, s] v[s],     p[t, .] = softmax over C[t] of scale q[t] . k[s]

C[t] are the `top_k` keys of the greatest scores. They jump from one set to another on a set of
measure zero; between, they are constants, so the gradient is that of a softmax over gathered keys.
A `scan` of all keys finds them, or, where keys are planar, `hulls` do (`attention.hardmax_layers`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention import chips, dispatch, hardmax_layers, hardmax_levels, masks, parts, plane
from attention.dispatch import Implementation
from attention.masks import Mask

CROSSOVER = 2**13
"""Below so many queries or keys `hulls` is no faster (experiments/results/hull.json), and compiles
for longer.
"""
PER_KEY = 2**10
"""Below so many for each of `top_k` it is slower, on two CPU cores (BUILD_NOTES.md)."""
MEASURED = 32
"""The greatest `top_k` of which that is known: candidates grow as its square."""
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
    s = jnp.where(seen, plane.scores(q, keys) * scale, -jnp.inf)
    best, index = parts.top_k(s, top_k)
    # Not the first of `best`: a slice of it keeps XLA from seeing that a sort ends after `top_k`.
    m = jnp.maximum(s.max(-1, keepdims=True), jnp.finfo(s.dtype).min)
    lse = m[..., 0] + jnp.log(jnp.exp(s - m).sum(-1))
    return jnp.where(best > -jnp.inf, index, -1), lse

  index, lse = lax.map(one, (jnp.arange(count, dtype=jnp.int32), blocks))
  index = index.transpose(1, 0, 4, 2, 3, 5).reshape(B, count * block, N, top_k)[:, :T]
  return index, lse.transpose(1, 0, 4, 2, 3).reshape(B, count * block, N)[:, :T]


class Call(NamedTuple):
  """A softmax over the `top_k` best keys."""

  q: Float[Array, "B T N H"]
  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K h"]
  mask: Mask
  top_k: int
  scale: float


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K h"],
  mask: Mask,
  *,
  top_k: int,
  scale: float,
  implementation: str | None = None,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
  """The output, float32 or float64, and the part of the whole softmax that was retrieved."""
  dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
  if 0 in (*q.shape[:3], k.shape[1]):
    return jnp.zeros((*q.shape[:3], v.shape[3]), dtype), jnp.zeros(q.shape[:3], jnp.float32)
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  call = Call(q, k, v, mask, top_k, scale)
  index, lse = dispatch.run(implementation, IMPLEMENTATIONS, call)
  return softmax_over(q, k, v, index, lse, scale=scale)


def _scan(call: Call) -> tuple[Array, Array]:
  return retrieve(call.q, call.k, call.mask, top_k=call.top_k, scale=call.scale)


def _hulls(call: Call) -> tuple[Array, Array]:
  """The log-sum-exp, O(T S) time, is a loop of its own: not computed if nobody uses it."""
  q = call.q * jnp.sign(jnp.asarray(call.scale, call.q.dtype))
  causal = call.mask == masks.causal()
  index = hardmax_layers.retrieve(q, call.k, top_k=call.top_k, causal=causal)
  return index, _scan(call._replace(top_k=1))[1]


def _layered(call: Call) -> str | None:
  if reason := hardmax_levels.unsupported(call.q, call.k, call.mask):
    return reason
  most = hardmax_layers.DIAGONAL
  return f"top_k is at most {most}, not {call.top_k}" if call.top_k > most else None


def _few(call: Call) -> str | None:
  if (platform := chips.current().platform) != "cpu":
    return f"on CPUs it is faster; on a {platform} it was not measured"
  if call.top_k > MEASURED:
    return f"it was measured up to top_k = {MEASURED}, not {call.top_k}"
  few = min(call.q.shape[1], call.k.shape[1])
  least = max(CROSSOVER, PER_KEY * call.top_k)
  return f"below {least} queries and keys a scan is faster: {few}" if few < least else None


IMPLEMENTATIONS: Mapping[str, Implementation] = {
  "hulls": Implementation(_hulls, _layered, automatic=_few),
  "scan": Implementation(_scan, lambda call: None),
}


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
  none, index = index < 0, jnp.maximum(index, 0)
  scores = (q[..., None, :] * parts.read(k, index)).sum(-1) * scale
  s = jnp.where(none, -jnp.inf, scores)
  m = lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), jnp.finfo(s.dtype).min))
  p = jnp.where(none, 0.0, jnp.exp(s - m))
  total = p.sum(-1, keepdims=True)
  out = (p / jnp.where(total > 0, total, 1.0))[..., None] * parts.read(v, index)
  found = m[..., 0] + jnp.log(jnp.where(total > 0, total, 1.0))[..., 0]
  mass = jnp.ones_like(found) if lse is None else jnp.exp(jnp.minimum(found - lse, 0.0))
  mass = jnp.where(total[..., 0] > 0, mass, 0.0).astype(jnp.float32)
  return out.sum(-2), lax.stop_gradient(mass)
