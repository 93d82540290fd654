"""Softmax attention in tiles: O(T + S) memory forward and backward, pure XLA, so it runs on
anything.

The forward pass walks the queries block by block; for each it visits the key blocks that the mask
leaves, those that are full without a mask and then those that are mixed, and keeps a running
softmax. Of the T x S scores only one tile exists at a time. Nothing is saved for the backward pass
but the inputs, the output and the log-sum-exp: it walks the key blocks, recomputes each tile's
probabilities p = e^(score - lse), and adds up

    dV += p^T dO     dS = p (dO V^T - delta)     dQ += dS K     dK += dS^T Q     delta = rowsum(dO
    O) - dlse

Dao et al. 2022, algorithm 4, https://arxiv.org/abs/2205.14135; the log-sum-exp has a gradient too.
Which blocks to visit comes from `Mask.block`, in O(blocks), so a window costs what is in the
window, forward and backward. The order of the sums is fixed: two runs give the same bits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention import loops, masks, online_softmax, scores
from attention.masks import Mask, Span
from attention.scores import Modifiers
from attention.types import Array

MAX_BLOCK = 512
"""The longest side of a tile."""

_TILE_ELEMENTS = 2**21
"""The scores of one tile, all heads together: 8 MiB, near what a core's cache holds of them."""


class Settings(NamedTuple):
  """What is known before anything runs."""

  scale: float
  logit_cap: float | None
  block_q: int
  block_k: int


class Schedule(NamedTuple):
  """For each block of one axis, the blocks of the other that it visits: the full ones first, then
  the mixed.
  """

  order: np.ndarray | Array  # rows x columns
  full: np.ndarray | Array  # rows
  active: np.ndarray | Array  # rows: full and mixed


def schedule(mask: Mask, T: int, S: int, settings: Settings) -> tuple[Schedule, Schedule]:
  """The visits of each query block and of each key block. O(blocks) time and memory."""
  some, every = mask.block(Span.blocks(T, settings.block_q), Span.blocks(S, settings.block_k))
  some, every = some.any((0, 1)), every.all((0, 1))

  def visits(some, every):
    xp = np if isinstance(some, np.ndarray) else jnp
    state = xp.where(every, 0, xp.where(some, 1, 2))
    order = xp.argsort(state, axis=1, stable=True).astype(np.int32)
    return Schedule(order, (state == 0).sum(1, dtype=np.int32), (state < 2).sum(1, dtype=np.int32))

  return visits(some, every), visits(some.T, every.T)


def block_size(mask: Mask, heads: int, T: int, S: int) -> int:
  """The side of a tile: as large as the cache allows, smaller where that lets a static mask skip
  more.
  """
  sizes = [b for b in (MAX_BLOCK, 256, 128) if heads * b * b <= _TILE_ELEMENTS or b == 128]
  longest = max(T, S)
  if not mask.is_static or longest <= sizes[-1] or longest > 2**16:
    return sizes[0]

  def work(
    b: int,
  ) -> float:  # visited pairs, and what a visit costs besides: about that of 64 x 64 pairs
    return float(mask.block(Span.blocks(T, b), Span.blocks(S, b)).any.sum()) * (b * b + 64 * 64)

  return min(sizes, key=work)


def attend(
  q: Array,
  k: Array,
  v: Array,
  mask: Mask,
  modifiers: Modifiers,
  sinks: Array | None,
  *,
  scale: float,
  logit_cap: float | None,
  block: int | None = None,
) -> tuple[Array, Array]:
  """The output `B T N h` and the log-sum-exp `B N T`, float32, of q `B T N H`, k `B S K H`, v `B S
  K h`.
  """
  B, T, N, _ = q.shape
  S, K, h = v.shape[1:]
  block = block or block_size(mask, N, T, S)
  block_q, block_k = (min(block, -(-length // 8) * 8) for length in (T, S))
  settings = Settings(scale, logit_cap, block_q, block_k)
  if S % block_k:
    mask = mask & masks.prefix(S)
  q, k, v, modifiers, sinks = loops.together((q, k, v, modifiers, sinks))
  q_heads = _padded(q.reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4), 3, block_q)
  k_heads, v_heads = (_padded(x.transpose(0, 2, 1, 3), 2, block_k) for x in (k, v))
  if modifiers.bias is not None:
    bias = modifiers.bias
    bias = _padded(bias, 2, block_q) if bias.shape[2] > 1 else bias
    bias = _padded(bias, 3, block_k) if bias.shape[3] > 1 else bias
    modifiers = modifiers._replace(bias=bias)
  out, lse = _attend(settings, q_heads, k_heads, v_heads, modifiers, sinks, mask)
  out = out[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, N, h)
  return out.astype(v.dtype), lse[..., :T].reshape(B, N, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, q, k, v, modifiers, sinks, mask):
  return _attend_forward(settings, q, k, v, modifiers, sinks, mask)[0]


def _attend_forward(settings, q, k, v, modifiers, sinks, mask):
  def rows(mask, modifiers, q, k, v):
    return (), _forward(settings, q, k, v, modifiers, sinks, mask)

  _, (out, lse) = _over_rows(settings, rows, mask, modifiers, (), (q, k, v))
  return (out, lse), (q, k, v, modifiers, sinks, mask, out, lse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_backward(settings, saved, gradients):
  q, k, v, modifiers, sinks, mask, out, lse = saved
  d_out, d_lse = gradients
  delta = (d_out * out).sum(-1) - d_lse
  d_sinks = None
  if sinks is not None:
    share = jnp.exp(sinks.astype(jnp.float32).reshape(1, *q.shape[1:3], 1) - lse)
    d_sinks = -(share * delta).sum((0, 3)).reshape(sinks.shape).astype(sinks.dtype)
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)

  def rows(mask, modifiers, q, k, v, d_out, lse, delta):
    dq, dk, dv, d_modifiers = _backward(settings, q, k, v, modifiers, mask, d_out, lse, delta)
    return d_modifiers, (dq, dk, dv)

  operands = (q, k, v, d_out.astype(v.dtype), lse, delta)
  d_modifiers, d_operands = _over_rows(settings, rows, mask, modifiers, modifiers, operands)
  d_modifiers, dq, dk, dv = jax.tree.map(
    lambda gradient, x: gradient.astype(x.dtype), (d_modifiers, *d_operands), (modifiers, q, k, v)
  )
  return dq, dk, dv, d_modifiers, d_sinks, None


@_attend_backward.defjvp
def _no_second_derivative(settings, primals, tangents):
  raise NotImplementedError(
    "'tiled' is differentiable once, its backward pass recomputes and saves nothing; "
    "implementation='xla' has derivatives of every order in O(T S) memory"
  )


_attend.defvjp(_attend_forward, _attend_backward)


def _over_rows(settings, run, mask, modifiers, shared, operands):
  """`run` over the batch: all rows at once where their tiles fit the cache together, else one after
  the other.

  `run(mask, modifiers, *operands)` returns a sum over the rows, shaped like `shared`, and results
  of each row.
  """
  B, K, G = operands[0].shape[:3]
  if B == 1 or B * K * G * settings.block_q * settings.block_k <= _TILE_ELEMENTS:
    return run(mask, modifiers, *operands)

  def row(total, b):
    one = [lax.dynamic_slice_in_dim(x, b, 1) for x in operands]
    bias = modifiers.bias
    if bias is not None and bias.shape[0] > 1:
      bias = lax.dynamic_slice_in_dim(bias, b, 1)
    part, results = run(mask.row(b), modifiers._replace(bias=bias), *one)
    total = jax.tree.map(functools.partial(_accumulate, b), total, part)
    return total, jax.tree.map(lambda x: x[0], results)

  zero = loops.zero((mask, modifiers, operands))
  start = jax.tree.map(lambda x: _zeros(x) + zero, shared)
  return lax.scan(row, start, jnp.arange(B, dtype=jnp.int32))


def _accumulate(b: Array, total: Array, part: Array) -> Array:
  """Adds a row's part to what all rows share, or puts it into the row's own place."""
  if total.shape == part.shape:
    return total + part
  return lax.dynamic_update_slice_in_dim(total, part, b, 0)


def _padded(x: Array, axis: int, block: int) -> Array:
  """Zeros to a multiple of `block`: no query needs them and no key among them is allowed."""
  missing = -x.shape[axis] % block
  widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths) if missing else x


def _tile(x: Array, axis: int, index: Array, block: int) -> Array:
  return lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _positions(index: Array, block: int) -> Array:
  return index * block + jnp.arange(block, dtype=jnp.int32)


class _Tile:
  """One tile of one call: where it lies, its scores, its mask."""

  def __init__(self, settings: Settings, i: Array, j: Array):
    self.settings, self.q_block, self.k_block = settings, i, j
    self.q_idx = _positions(i, settings.block_q)
    self.k_idx = _positions(j, settings.block_k)

  def part(self, modifiers: Modifiers) -> Modifiers:
    """The modifiers with the bias of this tile alone."""
    return modifiers if modifiers.bias is None else modifiers._replace(bias=self.of(modifiers.bias))

  def of(self, x: Array) -> Array:
    block_q, block_k = self.settings.block_q, self.settings.block_k
    return scores.tile_of(x, (self.q_block * block_q, block_q), (self.k_block * block_k, block_k))

  def scores(self, q: Array, k: Array, modifiers: Modifiers) -> Array:
    """The scores of the tile, unmasked: `B K G q k`, float32; the modifiers are those of `part`."""
    return self.modify(_sum("bkgqh,bksh->bkgqs", q, k), modifiers)

  def modify(self, product: Array, modifiers: Modifiers) -> Array:
    scale, cap = self.settings.scale, self.settings.logit_cap
    return scores.modify(product, modifiers, self.q_idx, self.k_idx, scale=scale, logit_cap=cap)

  def add(self, total: Modifiers, part: Modifiers) -> Modifiers:
    """The gradient of the modifiers with this tile's part added where it belongs."""
    bias, slopes = total
    if bias is not None and part.bias is not None:
      starts = (self.q_block * self.settings.block_q, self.k_block * self.settings.block_k)
      starts = tuple(x if size > 1 else 0 for x, size in zip(starts, bias.shape[2:], strict=True))
      new = self.of(bias) + part.bias.astype(jnp.float32)
      bias = lax.dynamic_update_slice(bias, new, (0, 0, *starts))
    if slopes is not None and part.alibi_slopes is not None:
      slopes = slopes + part.alibi_slopes.astype(jnp.float32)
    return Modifiers(bias, slopes)

  def masked(self, tile: Array, mask: Mask | None) -> Array:
    """-inf where the mask, if any, says no."""
    if mask is None:
      return tile
    allowed = jnp.asarray(mask(self.q_idx, self.k_idx))
    return jnp.where(scores.grouped(allowed, tile.shape[1]), tile, -jnp.inf)


def _forward(settings, q, k, v, modifiers, sinks, mask):
  """(out `B K G T h` float32, lse `B K G T`) of q `B K G T H`, k `B K S H`, v `B K S h`."""
  B, K, G, T, _ = q.shape
  by_query, _ = schedule(mask, T, k.shape[2], settings)
  order, full, active = map(jnp.asarray, by_query)
  block_q, block_k = settings.block_q, settings.block_k
  zero = loops.zero((q, k, v, modifiers, sinks, mask))

  def row(i):
    q_tile = _tile(q, 3, i, block_q)

    def visit(n, state, mask):
      tile = _Tile(settings, i, order[i, n])
      k_tile, v_tile = (_tile(x, 2, tile.k_block, block_k) for x in (k, v))
      s = tile.masked(tile.scores(q_tile, k_tile, tile.part(modifiers)), mask)
      return online_softmax.update(state, s, v_tile, "bkgqs,bksh->bkgqh")

    state = online_softmax.start((B, K, G, block_q), v.shape[-1])
    state = jax.tree.map(lambda x: x + zero, state)
    if sinks is not None:
      sink = sinks.astype(jnp.float32).reshape(1, K, G, 1)
      state = state._replace(m=jnp.broadcast_to(sink, state.m.shape), l=jnp.ones_like(state.l))
    state = lax.fori_loop(0, full[i], functools.partial(visit, mask=None), state)
    state = lax.fori_loop(full[i], active[i], functools.partial(visit, mask=mask), state)
    return online_softmax.finish(state)

  out, lse = lax.map(row, jnp.arange(T // block_q, dtype=jnp.int32))
  return _joined(out), _joined(lse)


def _joined(blocks: Array) -> Array:
  """`blocks B K G block ...` to `B K G T ...`."""
  blocks = jnp.moveaxis(blocks, 0, 3)
  return blocks.reshape(*blocks.shape[:3], -1, *blocks.shape[5:])


def _backward(settings, q, k, v, modifiers, mask, d_out, lse, delta):
  """(dq, dk, dv, dmodifiers), all float32. An empty row comes with lse = +inf, so that its
  probabilities are 0.
  """
  B, K, G, T, _ = q.shape
  _, by_key = schedule(mask, T, k.shape[2], settings)
  order, full, active = map(jnp.asarray, by_key)
  block_q, block_k = settings.block_q, settings.block_k
  zero = loops.zero((q, k, v, modifiers, mask, d_out, lse))

  def column(carry, j):
    k_tile, v_tile = (_tile(x, 2, j, block_k) for x in (k, v))

    def visit(n, carry, mask):
      dk, dv, dq, d_modifiers = carry
      tile = _Tile(settings, order[j, n], j)
      q_tile, d_tile, lse_tile, delta_tile = (
        _tile(x, 3, tile.q_block, block_q) for x in (q, d_out, lse, delta)
      )
      product = _queries_first(_sum("bksh,bkgqh->bksgq", k_tile, q_tile))
      s, pull = jax.vjp(tile.modify, product, tile.part(modifiers))
      p = jnp.exp(tile.masked(s, mask) - lse_tile[..., None])
      dv += _sum("bksgq,bkgqh->bksh", _keys_first(p), d_tile)
      dp = _queries_first(_sum("bksh,bkgqh->bksgq", v_tile, d_tile))
      d_product, d_part = pull(p * (dp - delta_tile[..., None]))
      d_product = _keys_first(d_product)
      dk += _sum("bksgq,bkgqh->bksh", d_product, q_tile)
      dq_tile = _tile(dq, 4, tile.q_block, block_q)
      # Both operands float32: XLA's CPU backend has no product of two bfloat16 that sums over rows.
      dq_tile += _sum("bksh,bksgq->bkhgq", k_tile.astype(jnp.float32), d_product)
      dq = lax.dynamic_update_slice_in_dim(dq, dq_tile, tile.q_block * block_q, 4)
      return dk, dv, dq, tile.add(d_modifiers, d_part)

    state = (_zeros(k_tile) + zero, _zeros(v_tile) + zero, *carry)
    state = lax.fori_loop(0, full[j], functools.partial(visit, mask=None), state)
    state = lax.fori_loop(full[j], active[j], functools.partial(visit, mask=mask), state)
    return state[2:], state[:2]

  dq = jnp.zeros((B, K, q.shape[-1], G, T), jnp.float32)
  start = jax.tree.map(lambda x: x + zero, (dq, jax.tree.map(_zeros, modifiers)))
  blocks = jnp.arange(k.shape[2] // block_k, dtype=jnp.int32)
  (dq, d_modifiers), (dk, dv) = lax.scan(column, start, blocks)
  dk, dv = (jnp.moveaxis(x, 0, 2).reshape(B, K, -1, x.shape[-1]) for x in (dk, dv))
  return dq.transpose(0, 1, 3, 4, 2), dk, dv, d_modifiers


def _queries_first(x: Array) -> Array:
  """`B K s G q` as `B K G q s`. The backward pass keeps its tiles keys first: so laid out, the
  products that sum over queries (dV, dK) read their operands row by row, 2 to 3 times faster on a
  CPU than the other way round.
  """
  return x.transpose(0, 1, 3, 4, 2)


def _keys_first(x: Array) -> Array:
  return x.transpose(0, 1, 4, 2, 3)


def _zeros(x: Array) -> Array:
  return jnp.zeros(x.shape, jnp.float32)


def _sum(contract: str, x: Array, y: Array) -> Array:
  """A matrix product in the precision of the narrower operand, with a float32 sum."""
  dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
  return jnp.einsum(contract, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
