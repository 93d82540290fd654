"""Hard-max attention in tiles: any head width, any mask, O(T + S) memory forward and backward.

    m[t] = max_s score[t, s]     count[t] = #{s: score[t, s] = m[t]}     last[t] = max such s

The first pass visits the tiles that the mask leaves and keeps these three. Where no query has two
winners, as with random keys, the output is one gather and the gradient of the values one scatter;
elsewhere a second pass scores the tiles again and multiplies the ties, zeros and ones, into
the values. Scores are those of `attention.plane`, rounded alike in every pass, so that both see the
same ties. A chip's kernel (`pallas_kernels.hardmax`), which rounds so too, may make the first pass.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from attention import kernels, loops, lowering, masks, plane, tiled
from attention.masks import Mask
from attention.types import Array

_TILE = 2**20
"""Scores in a tile, all heads together."""


class Winners(NamedTuple):
  """Of each query, `B K G T`."""

  score: Array
  """The greatest score; -inf where there is no key."""
  count: Array
  """How many keys have it."""
  last: Array
  """The last of them; -1 where there is none."""


class _Tiles(NamedTuple):
  """Padded arrays `B K G T H`, `B K S H`, and the tiles to visit."""

  q: Array
  k: Array
  mask: Mask
  by_query: tiled.Schedule
  by_key: tiled.Schedule
  block_q: int
  block_k: int

  def score(self, i: Array, j: Array) -> Array:
    """The scores of query block i and key block j, -inf where the mask says no: `B K G q k`."""
    q = lax.dynamic_slice_in_dim(self.q, i * self.block_q, self.block_q, 3)
    k = lax.dynamic_slice_in_dim(self.k, j * self.block_k, self.block_k, 2)
    q_idx = i * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)
    k_idx = j * self.block_k + jnp.arange(self.block_k, dtype=jnp.int32)
    B, K, G = self.q.shape[:3]
    seen = self.mask(q_idx, k_idx)
    seen = seen[:, None] if seen.shape[1] == 1 else seen.reshape(-1, K, G, *seen.shape[2:])
    s = plane.scores(q, k[:, :, None])
    return jnp.where(seen, s, -jnp.inf)


def _tiles(q: Array, k: Array, mask: Mask) -> _Tiles:
  B, K, G, T, _ = q.shape
  S = k.shape[2]
  block = next(b for b in (512, 256, 128, 64) if B * K * G * b * b <= _TILE or b == 64)
  block_q, block_k = (min(block, -(-length // 8) * 8) for length in (T, S))
  if S % block_k:
    mask = mask & masks.prefix(S)
  by_query, by_key = tiled.schedule(mask, T, S, tiled.Tiling(block_q, block_k))
  by_query, by_key = jax.tree.map(jnp.asarray, (by_query, by_key))
  return _Tiles(
    _padded(q, 3, block_q), _padded(k, 2, block_k), mask, by_query, by_key, block_q, block_k
  )


def _padded(x: Array, axis: int, block: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, widths)


def _visit(schedule: tiled.Schedule, start: Any, tile: Any) -> Any:
  """For each row of a schedule `tile(carry, row, column)` over its columns: carries, stacked."""

  def row(i):
    return lax.fori_loop(
      0, schedule.active[i], lambda n, carry: tile(carry, i, schedule.order[i, n]), start
    )

  return lax.map(row, jnp.arange(schedule.active.shape[0], dtype=jnp.int32))


def _join(x: Array, axis: int, length: int) -> Array:
  """Blocks, stacked in front, as one axis."""
  x = jnp.moveaxis(x, 0, axis)
  shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
  return lax.slice_in_dim(x.reshape(shape), 0, length, axis=axis)


def _winners(tiles: _Tiles, T: int) -> Winners:
  shape = (*tiles.q.shape[:3], tiles.block_q)
  zero = loops.zero((tiles.q, tiles.k), tiles.q.dtype)
  start = Winners(
    jnp.full(shape, -jnp.inf, tiles.q.dtype) + zero,
    jnp.zeros(shape, jnp.int32) + zero.astype(jnp.int32),
    jnp.full(shape, -1, jnp.int32) + zero.astype(jnp.int32),
  )

  def tile(old, i, j):
    s = tiles.score(i, j)
    k_idx = j * tiles.block_k + jnp.arange(tiles.block_k, dtype=jnp.int32)
    most = s.max(-1)
    tied = (s == most[..., None]) & (s > -jnp.inf)
    count, last = tied.sum(-1, dtype=jnp.int32), jnp.where(tied, k_idx, -1).max(-1)
    score = jnp.maximum(old.score, most)
    old_count = jnp.where(old.score == score, old.count, 0)
    old_last = jnp.where(old.score == score, old.last, -1)
    new_count, new_last = jnp.where(most == score, count, 0), jnp.where(most == score, last, -1)
    return Winners(score, old_count + new_count, jnp.maximum(old_last, new_last))

  return jax.tree.map(lambda x: _join(x, 3, T), Winners(*_visit(tiles.by_query, start, tile)))


def _tied(tiles: _Tiles, score: Array, i: Array, j: Array) -> Array:
  """The ties of a tile, ones and zeros, given the padded greatest scores."""
  best = lax.dynamic_slice_in_dim(score, i * tiles.block_q, tiles.block_q, 3)[..., None]
  s = tiles.score(i, j)
  return ((s == best) & (s > -jnp.inf)).astype(tiles.q.dtype)


def _sums(tiles: _Tiles, winners: Winners, v: Array) -> Array:
  """The sums of the winners' values, `B K G T h`."""
  score, T = _padded(winners.score, 3, tiles.block_q), winners.score.shape[3]
  v = _padded(v, 2, tiles.block_k)
  zero = loops.zero((tiles.q, tiles.k, v), v.dtype)
  start = jnp.zeros((*tiles.q.shape[:3], tiles.block_q, v.shape[-1]), v.dtype) + zero

  def tile(total, i, j):
    values = lax.dynamic_slice_in_dim(v, j * tiles.block_k, tiles.block_k, 2)
    tied = _tied(tiles, score, i, j)
    return total + jnp.einsum("bkgts,bksh->bkgth", tied, values, precision="highest")

  return _join(_visit(tiles.by_query, start, tile), 3, T)


def _sums_transposed(tiles: _Tiles, winners: Winners, g: Array, S: int) -> Array:
  """For each key the sum of the g of the queries whose winner it is, `B K S h`."""
  score, g = (_padded(x, 3, tiles.block_q) for x in (winners.score, g))
  zero = loops.zero((tiles.q, tiles.k, g), g.dtype)
  start = jnp.zeros((*tiles.k.shape[:2], tiles.block_k, g.shape[-1]), g.dtype) + zero

  def tile(total, j, i):
    sent = lax.dynamic_slice_in_dim(g, i * tiles.block_q, tiles.block_q, 3)
    tied = _tied(tiles, score, i, j)
    return total + jnp.einsum("bkgts,bkgth->bksh", tied, sent, precision="highest")

  return _join(_visit(tiles.by_key, start, tile), 2, S)


def _read(v: Array, winners: Winners) -> Array:
  """The value of the last winner, 0 where there is none: `B K G T h`."""
  last = winners.last.reshape(*winners.last.shape[:2], -1, 1)
  out = jnp.take_along_axis(v, jnp.maximum(last, 0), axis=2)
  out = out.reshape(*winners.last.shape, v.shape[-1])
  return jnp.where(winners.count[..., None] > 0, out, 0)


def _send(g: Array, winners: Winners, S: int) -> Array:
  """The transpose of `_read`."""
  B, K = g.shape[:2]
  g = jnp.where(winners.count[..., None] > 0, g, 0).reshape(B, K, -1, g.shape[-1])
  last = jnp.maximum(winners.last, 0).reshape(B, K, -1)
  add = lambda g, last: jax.ops.segment_sum(g, last, S)
  return jax.vmap(jax.vmap(add))(g, last)


class _Static(NamedTuple):
  """What is known before anything runs."""

  ties: str
  chip: str | None
  """Whose kernel finds the winners, or None."""


_kernel = functools.partial(kernels.module, "hardmax")


def unsupported(chip: str, call: Any) -> str | None:
  """Why a chip's kernel cannot run a call of `hardmax_attention`, or None."""
  (T, H), S = (call.query.shape[i] for i in (1, 3)), call.key.shape[1]
  if reason := kernels.unsupported(chip, call[:3]):
    return reason
  if call.query.dtype == jnp.float64:
    return "it computes in float32, and the query is float64"
  if not call.mask.is_static:
    return f"its masks are of positions alone, not of arrays as in {type(call.mask).__name__}"
  return _kernel(chip).unsupported(T, S, H)


def _winners_on(chip: str, q: Array, k: Array, mask: Mask) -> Winners:
  """By its kernel."""
  T, S, kernel = q.shape[3], k.shape[2], _kernel(chip)
  mask = lowering.cut(mask, S, kernel.BLOCK[1])
  by_query, _ = lowering.visits(mask, T, S, *kernel.BLOCK)
  rule = lowering.Rule(jax.tree.structure(mask))

  @sequential_vmap
  def run(q, k):
    heads = q.reshape(q.shape[0], -1, *q.shape[3:])
    return kernel.winners(heads.swapaxes(2, 3), k.swapaxes(2, 3), rule, by_query)

  return Winners(*(x.reshape(q.shape[:4]) for x in run(q, k)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, mask):
  return _forward(static, q, k, v, mask)[0]


def _forward(static, q, k, v, mask):
  tiles = _tiles(q, k, mask)
  if static.chip is None:
    winners = _winners(tiles, q.shape[3])
  else:
    winners = _winners_on(static.chip, q, k, mask)
  read = functools.partial(_read, v, winners)
  if static.ties == "latest":
    out = read()
  else:
    count = jnp.maximum(winners.count, 1)[..., None].astype(v.dtype)
    average = lambda: _sums(tiles, winners, v) / count
    out = lax.cond((winners.count <= 1).all(), read, average)
  return (out, winners), (q, k, mask, winners)


def _backward(static, saved, cotangents):
  q, k, mask, winners = saved
  S, g = k.shape[2], cotangents[0]
  if static.ties == "average":
    g = g / jnp.maximum(winners.count, 1)[..., None].astype(g.dtype)
  send = functools.partial(_send, g, winners, S)
  if static.ties == "latest":
    dv = send()
  else:
    tiles = _tiles(q, k, mask)
    all_tied = lambda: _sums_transposed(tiles, winners, g, S)
    dv = lax.cond((winners.count <= 1).all(), send, all_tied)
  return jnp.zeros_like(q), jnp.zeros_like(k), dv, None


_attend.defvjp(_forward, _backward)


def attend(
  q: Array, k: Array, v: Array, mask: Mask, *, ties: str, chip: str | None = None
) -> tuple[Array, Winners]:
  """The output `B T N h` and the winners `B T N` of q `B T N H`, k `B S K H`, v `B S K h`,
  all float32 or all float64; the winners by `chip`'s kernel, which must not be `unsupported`.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  q, k, v = loops.together((q, k, v))
  grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  out, winners = _attend(_Static(ties, chip), grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
  out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
  return out, jax.tree.map(lambda x: x.transpose(0, 3, 1, 2).reshape(B, T, N), winners)
