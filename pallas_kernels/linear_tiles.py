"""The small arithmetic around the linear-attention kernels, on arrays of a number per token or of a
vector per chunk, in float32.

Decays are log decays in base 2. Between a write at j and a read at i of one chunk lie g_{j+1} + ...
+ g_i. A difference of two running sums has those digits only if the sums are kept in two floats,
hi + lo = the sum to 48 bits, and subtracted part by part: (hi_i - hi_j) + (lo_i - lo_j).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

CHUNK = 64
"""Tokens of a chunk."""

LOG2_E = 1.4426950408889634


def chunked(x: Array, axis: int) -> Array:
  """An axis of tokens as two, `C CHUNK`, with zeros behind the last token."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % CHUNK)
  x = jnp.pad(x, pad)
  return x.reshape(*x.shape[:axis], -1, CHUNK, *x.shape[axis + 1 :])


def per_token(g: Array | None, B: int, T: int, N: int) -> Array:
  """Decays per token in base 2, `B N C CHUNK`, of decays per head, per token or of none."""
  if g is None:
    g = jnp.zeros((N,), jnp.float32)
  g = jnp.broadcast_to(g, (B, T, N)).astype(jnp.float32) * LOG2_E
  return chunked(g.swapaxes(1, 2), 2)


def running_sum(g: Array) -> tuple[Array, Array]:
  """The running sum along the last axis in two floats, hi and lo."""

  def add(a, b):
    (a_hi, a_lo), (b_hi, b_lo) = a, b
    total = a_hi + b_hi
    part = total - a_hi
    error = (a_hi - (total - part)) + (b_hi - part)
    lo = error + a_lo + b_lo
    hi = total + lo
    return hi, lo - (hi - total)

  return lax.associative_scan(add, (g, jnp.zeros_like(g)), axis=g.ndim - 1)


def wide(x: Array, axis: int, multiple: int) -> Array:
  """With zeros up to a multiple."""
  missing = -x.shape[axis] % multiple
  pad = [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)]
  return jnp.pad(x, pad) if missing else x


def following(g: Array) -> Array:
  """What follows each entry of the last axis until its end."""
  later = jnp.pad(g[..., 1:], [(0, 0)] * (g.ndim - 1) + [(0, 1)])
  return lax.cumsum(later, axis=g.ndim - 1, reverse=True)


class Sums(NamedTuple):
  """What the decays of a chunk add up to."""

  hi: Array
  lo: Array
  read: Array
  """How far the state that enters has faded when a token reads, `B N C CHUNK`."""
  write: Array
  """How far what a token writes has faded when the chunk ends."""
  fade: Array
  """How far a state fades in the whole chunk, `B N C`."""


def sums(g: Array) -> Sums:
  """Of decays per token, `B N C CHUNK`."""
  hi, lo = running_sum(g)
  return Sums(hi, lo, jnp.exp2(hi), jnp.exp2(following(g)), jnp.exp2(hi[..., -1]))


def walk(fade: Array, add: Array, start: Array, *, reverse: bool = False) -> tuple[Array, Array]:
  """(z before every chunk, z after the last) of z <- fade z + add, vectors `B N C M`. In reverse
  "before" is after: chunks are walked from the last to the first.
  """
  if reverse:
    fade, add = fade[:, :, ::-1], add[:, :, ::-1]
  first = jnp.concatenate([fade[:, :, :1] * start[:, :, None] + add[:, :, :1], add[:, :, 1:]], 2)
  step = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
  _, z = lax.associative_scan(step, (fade, first), axis=2)
  before = jnp.concatenate([start[:, :, None], z[:, :, :-1]], 2)
  return before[:, :, ::-1] if reverse else before, z[:, :, -1]


def d_token(read: Array, column: Array, write: Array, through: Array) -> Array:
  """The gradient of decays per token, `B N C CHUNK`. A pair's term belongs to every decay after its
  write up to and with its read.

  Args:
    read: `B N C CHUNK`, the terms of all that a token reads, of the chunk's own writes and of the
      state that enters.
    column: the terms of what is read of a token's write inside of the chunk.
    write: those of what is left of it in the state that leaves.
    through: `B N C`, those of what entered and leaves.
  """
  later = lax.cumsum(read - column, axis=3, reverse=True)
  before = lax.cumsum(write, axis=3) - write
  return later + before + through[..., None]


def grouped(x: Array, heads: int) -> Array:
  """Gradients of every head, `B T N W`, summed over those that share one: `B T heads W`."""
  if x.shape[2] == heads:
    return x
  parts = x.reshape(*x.shape[:2], heads, -1, x.shape[3])
  return parts.astype(jnp.float32).sum(3).astype(x.dtype)
