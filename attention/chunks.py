"""The arithmetic inside one chunk of a recurrence: log decays, and documents that begin anywhere.

Between a write at token j and a read at token i >= j a state decays by exp(g_{j+1} + ... + g_i),
with every g <= 0. The usual way takes differences of one running sum, G_i - G_j, and after a g of
-10000 the sum has no digits left for the small decays that follow. Here nothing is ever subtracted.
A chunk is halved and halved again; where i lies in the right half of a block and j in the left
half,

    g_{j+1} + ... + g_i  =  (rest of the left half after j)  +  (right half up to and with i),

two sums of numbers of one sign, so every exponent is <= 0, every exp is <= 1, and each is exact to
rounding for any decay from 0 to -inf. Both factors are at least their product: what underflows is
truly zero. log2(C) levels make all pairs of a chunk of C tokens. The gradient of a sum without
differences has no cancellation either.

Arrays here are head-major: g is [... C W], W = 1 (a decay per head) or W = M (a decay per channel);
C is a power of two. The idea of splitting a chunk so that exponents stay negative is GLA's
secondary chunking (https://arxiv.org/abs/2312.06635, section 4.3), carried down to single tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attention import products

# Below this many tokens a half is too small for a matrix unit: multiply and add instead.
_SMALLEST_MATMUL = 8


class DecaySums(NamedTuple):
  """Sums of log decays of every block of a chunk; at the last level the block is the chunk."""

  prefix: Float[Array, "... blocks n W"]
  """From the block's first token up to and with this one: how far a state that enters has faded."""
  suffix: Float[Array, "... blocks n W"]
  """After this token up to the block's end: how far its write fades until the state leaves."""
  total: Float[Array, "... blocks 1 W"]
  """Of the whole block."""


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Left and right neighbor of every pair of blocks: [... 2b n W] -> two of [... b n W]."""
  x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
  return x[..., 0, :, :], x[..., 1, :, :]


def _leaves(g: jax.Array) -> DecaySums:
  """Sums of the smallest blocks, one token each."""
  g = g[..., None, :]
  return DecaySums(prefix=g, suffix=jnp.zeros_like(g), total=g)


def _merge(sums: DecaySums) -> DecaySums:
  """Sums of blocks twice as long."""
  (prefix_l, prefix_r), (suffix_l, suffix_r) = _halves(sums.prefix), _halves(sums.suffix)
  total_l, total_r = _halves(sums.total)
  return DecaySums(
    prefix=jnp.concatenate([prefix_l, total_l + prefix_r], axis=-2),
    suffix=jnp.concatenate([suffix_l + total_r, suffix_r], axis=-2),
    total=total_l + total_r,
  )


def _lower_triangle(pairs: jax.Array, cross: jax.Array, fill: float) -> jax.Array:
  """[[left, fill], [cross, right]] of every pair of blocks: [... 2b n n] -> [... b 2n 2n]."""
  left, right = _halves(pairs)
  top = jnp.concatenate([left, jnp.full_like(cross, fill)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([cross, right], axis=-1)], axis=-2)


def decay_sums(g: Float[Array, "... C W"]) -> DecaySums:
  """Sums of the whole chunk: prefix and suffix [... C W], total [... 1 W]."""
  sums = _leaves(g)
  while sums.total.shape[-3] > 1:
    sums = _merge(sums)
  return DecaySums(*(x[..., 0, :, :] for x in sums))


def decay_between(g: Float[Array, "... C 1"]) -> Float[Array, "... C C"]:
  """Log decay between a write at j (column) and a read at i (row): <= 0, and -inf where j > i."""
  sums = _leaves(g)
  pairs = jnp.zeros_like(sums.total)
  while sums.total.shape[-3] > 1:
    right, left = _halves(sums.prefix)[1], _halves(sums.suffix)[0]
    pairs = _lower_triangle(pairs, right + jnp.swapaxes(left, -1, -2), -jnp.inf)
    sums = _merge(sums)
  return pairs[..., 0, :, :]


def decayed_scores(
  q: Float[Array, "... C M"],
  k: Float[Array, "... C M"],
  g: Float[Array, "... C M"],
  precision: jax.lax.Precision | None = None,
) -> Float[Array, "... C C"]:
  """P_ij = sum_m q_im k_jm exp(g_{j+1,m} + ... + g_im) for j <= i, else 0."""
  sums = _leaves(g)
  q, k = q[..., None, :], k[..., None, :]
  scores = jnp.sum(q * k, axis=-1, keepdims=True)
  while sums.total.shape[-3] > 1:
    n = q.shape[-2]
    reads = _halves(q)[1] * jnp.exp(_halves(sums.prefix)[1])
    writes = _halves(k)[0] * jnp.exp(_halves(sums.suffix)[0])
    if n < _SMALLEST_MATMUL:
      cross = jnp.sum(reads[..., :, None, :] * writes[..., None, :, :], axis=-1)
    else:
      cross = products.times_transposed(reads, writes, precision)
    scores = _lower_triangle(scores, cross, 0.0)
    sums = _merge(sums)
    q, k = (x.reshape(*x.shape[:-3], -1, 2 * n, x.shape[-1]) for x in (q, k))
  return scores[..., 0, :, :]


class RunMasks(NamedTuple):
  """Which tokens of a chunk may touch which, when documents (runs of one id) begin anywhere."""

  same: Bool[Array, "B 1 C C"]
  """Reader and writer are of one run."""
  entering: Bool[Array, "B 1 C 1"]
  """The token's run was active before the chunk: it may read the state that enters."""
  leaving: Bool[Array, "B 1 C 1"]
  """The token's run is the chunk's last: its write is in the state that leaves."""
  whole: Bool[Array, "B 1 1 1"]
  """No run begins in the chunk: what entered is still in what leaves."""


def number_runs(starts: Bool[Array, "B T"]) -> Int[Array, "B T"]:
  """The number of each token's run, from the flags of the tokens that begin one."""
  return jnp.cumsum(starts.astype(jnp.int32), axis=1)


def run_masks(runs: Int[Array, "B C"], before: Int[Array, " B"]) -> RunMasks:
  """The masks of one chunk, from its tokens' run numbers and the run active before it."""
  last = runs[:, -1]
  return RunMasks(
    same=(runs[:, :, None] == runs[:, None, :])[:, None],
    entering=(runs == before[:, None])[:, None, :, None],
    leaving=(runs == last[:, None])[:, None, :, None],
    whole=(last == before)[:, None, None, None],
  )
