"""Decays per channel inside a chunk, on a TPU.

    P_ij = sum_m q_im k_jm exp(g_{j+1,m} + ... + g_im)

Blocks of 8 tokens are walked diagonal by diagonal: keys move on by one token and fade by that
token's decay, so pairs that are d apart are one product and a sum over lanes. Blocks are then put
together two by two. Where i lies in the right one and j in the left one, what lies between is the
sum up to i in i's block and the rest of j's block after j, sums of numbers of one sign, and a tile
X, q faded in right blocks, k in left ones, holds all of a level's pairs as X X^T. No sum is ever
subtracted from another.

The gradient is JAX's own, of these very steps, made while the kernel is traced.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_tiles import LOG2_E, Array
from pallas_kernels.linear_tpu_tiles import CHUNK, Faded, product

_BLOCK = 8
"""Tokens of the smallest block: the rows of a register."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _roll(x: Array, by: int) -> Array:
  """Row i becomes row i + by, around the end."""
  return pltpu.roll(x, by % CHUNK, 0)


_roll.defvjp(
  lambda x, by: (_roll(x, by), None),
  lambda by, _, gradient: (_roll(gradient, -by),),
)


def _position(shape: tuple[int, ...], axis: int = 0) -> Array:
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def _sums(g: Array) -> tuple[Array, Array]:
  """Inside each smallest block, the sum up to and with a token, and of those after it."""
  row = _position(g.shape) % _BLOCK
  prefix, suffix = g, jnp.where(row < _BLOCK - 1, _roll(g, -1), 0.0)
  for by in (1, 2, 4):
    prefix = prefix + jnp.where(row >= by, _roll(prefix, by), 0.0)
    suffix = suffix + jnp.where(row < _BLOCK - by, _roll(suffix, -by), 0.0)
  return prefix, suffix


def _merged(prefix: Array, suffix: Array, total: Array, n: int) -> tuple[Array, Array, Array]:
  """The sums of blocks of 2 n tokens from those of n."""
  right = _position(total.shape) & n != 0
  other = jnp.where(right, _roll(total, n), _roll(total, -n))
  prefix = prefix + jnp.where(right, other, 0.0)
  return prefix, suffix + jnp.where(right, 0.0, other), total + other


def _diagonals(q: Array, k: Array, g: Array) -> Array:
  """The pairs of the smallest blocks."""
  i, j = (_position((CHUNK, CHUNK), axis) for axis in (0, 1))
  row, decay = _position(q.shape) % _BLOCK, jnp.exp2(g)
  pairs = jnp.where(i == j, (q * k).sum(1, keepdims=True), 0.0)
  for apart in range(1, _BLOCK):
    k = jnp.where(row >= apart, _roll(k, 1), 0.0) * decay
    pairs = jnp.where(i - j == apart, (q * k).sum(1, keepdims=True), pairs)
  return pairs


def faded(q: Array, k: Array, g: Array, dtype: Any) -> Faded:
  """A chunk with decays per channel `C M`, natural; q and k in float32."""
  g = g * LOG2_E
  i, j = (_position((CHUNK, CHUNK), axis) for axis in (0, 1))
  right, pairs = _position(q.shape), _diagonals(q, k, g)
  prefix, suffix = _sums(g)
  total, n = prefix + suffix, _BLOCK
  while n < CHUNK:
    reads = right & n != 0
    x = jnp.where(reads, q, k) * jnp.exp2(jnp.where(reads, prefix, suffix))
    crossing = (i // (2 * n) == j // (2 * n)) & (i & n != 0) & (j & n == 0)
    pairs = jnp.where(crossing, product(x, x, (1, 1), dtype), pairs)
    prefix, suffix, total = _merged(prefix, suffix, total, n)
    n *= 2
  fade = jnp.exp2(jnp.where(right == 0, total, 0.0).sum(0, keepdims=True))
  return Faded(q * jnp.exp2(prefix), k * jnp.exp2(suffix), pairs, fade)


def written(k: Array, g: Array) -> tuple[Array, Array]:
  """(keys as they write the state that leaves, its fading)."""
  g = g * LOG2_E
  prefix, suffix = _sums(g)
  total, n = prefix + suffix, _BLOCK
  while n < CHUNK:
    prefix, suffix, total = _merged(prefix, suffix, total, n)
    n *= 2
  fade = jnp.where(_position(g.shape) == 0, total, 0.0).sum(0, keepdims=True)
  return k * jnp.exp2(suffix), jnp.exp2(fade)
