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
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention import dropout, loops, masks, online_softmax, scores
from attention.exponential import exp
from attention.masks import Mask, Span
from attention.scores import Modifiers
from attention.types import Array

MAX_BLOCK = 512
"""The longest side of a tile."""

PAIR = 2
"""How many full blocks the forward pass visits at once: fewer, wider products, and no pair that a
mask forbids comes with them.
"""

_TILE_ELEMENTS = 2**21
"""The scores of a pair of blocks, all heads together: 8 MiB, what caches hold."""


class Settings(NamedTuple):
  """What is known before anything runs."""

  scale: float
  logit_cap: float | None
  block_q: int
  block_k: int
  dropout_rate: float = 0.0
  q_scale: float = 1.0
  """What queries are multiplied by, instead of the scores, where that is exact."""


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
  """The side of a block: as large as the cache allows two of them, smaller where that lets a static
  mask skip more.
  """
  sizes = [b for b in (MAX_BLOCK, 256, 128) if heads * PAIR * b * b <= _TILE_ELEMENTS or b == 128]
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
  dropout_rate: float = 0.0,
  dropout_seeds: Array | None = None,
  block: int | None = None,
) -> tuple[Array, Array]:
  """The output `B T N h` and the log-sum-exp `B N T`, float32, of q `B T N H`, k `B S K H`, v `B S
  K h`; the seeds of dropout are int32 `B N`.
  """
  B, T, N, _ = q.shape
  S, K, h = v.shape[1:]
  block = block or block_size(mask, N, T, S)
  block_q, block_k = (min(block, -(-length // 8) * 8) for length in (T, S))
  if S % block_k:
    mask = mask & masks.prefix(S)
  q, k, v, modifiers, sinks = loops.together((q, k, v, modifiers, sinks))
  q = _padded(q.reshape(B, T, K, N // K, -1), 1, block_q)
  k, v = (_padded(x, 1, block_k) for x in (k, v))
  if modifiers.bias is not None:
    bias = modifiers.bias
    bias = _padded(bias, 2, block_q) if bias.shape[2] > 1 else bias
    bias = _padded(bias, 3, block_k) if bias.shape[3] > 1 else bias
    modifiers = modifiers._replace(bias=bias)
  exact = _scales_exactly(q.dtype, scale)
  scales = {"scale": 1.0 if exact else scale, "q_scale": scale if exact else 1.0}
  settings = Settings(logit_cap=logit_cap, block_q=block_q, block_k=block_k,
                      dropout_rate=dropout_rate, **scales)  # fmt: skip
  seeds = dropout_seeds if dropout_rate else None
  out, lse = _attend(settings, q, k, v, modifiers, sinks, mask, seeds)
  return out[:, :T].reshape(B, T, N, h).astype(v.dtype), lse[..., :T].reshape(B, N, T)


def _scales_exactly(dtype: jnp.dtype, scale: float) -> bool:
  """Whether queries may be scaled instead of scores: in float32, or where it only moves the
  exponent of a bfloat16.
  """
  return dtype == jnp.float32 or (dtype == jnp.bfloat16 and math.frexp(scale)[0] == 0.5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, q, k, v, modifiers, sinks, mask, seeds):
  return _attend_forward(settings, q, k, v, modifiers, sinks, mask, seeds)[0]


def _attend_forward(settings, q, k, v, modifiers, sinks, mask, seeds):
  def rows(mask, modifiers, q, k, v, seeds):
    return (), _forward(settings, q, k, v, modifiers, sinks, mask, seeds)

  _, (out, lse) = _over_rows(settings, rows, mask, modifiers, (), (q, k, v, seeds))
  return (out, lse), (q, k, v, modifiers, sinks, mask, seeds, out, lse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_backward(settings, saved, gradients):
  q, k, v, modifiers, sinks, mask, seeds, out, lse = saved
  d_out, d_lse = gradients
  delta = jnp.einsum("btkgh,btkgh->bkgt", d_out, out) - d_lse
  d_sinks = None
  if sinks is not None:
    share = jnp.exp(sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1) - lse)
    d_sinks = -(share * delta).sum((0, 3)).reshape(sinks.shape).astype(sinks.dtype)
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)

  def rows(mask, modifiers, *operands):
    dq, dk, dv, d_modifiers = _backward(settings, modifiers, mask, *operands)
    return d_modifiers, (dq, dk, dv)

  operands = (q, k, v, d_out.astype(v.dtype), lse, delta, seeds)
  d_modifiers, d_operands = _over_rows(settings, rows, mask, modifiers, modifiers, operands)
  d_modifiers, dq, dk, dv = jax.tree.map(
    lambda gradient, x: gradient.astype(x.dtype), (d_modifiers, *d_operands), (modifiers, q, k, v)
  )
  return dq, dk, dv, d_modifiers, d_sinks, None, None


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
  B, _, K, G, _ = operands[0].shape
  if B == 1 or B * K * G * PAIR * settings.block_q * settings.block_k <= _TILE_ELEMENTS:
    return run(mask, modifiers, *operands)

  def row(total, b):
    one = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, b, 1), operands)
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


def _heads_first(x: Array, axis: int, index: Array, block: int) -> Array:
  """The block `r rows ...` of an array `B T K ...` (axis 1) or `B K G T` (axis 3): r = batch and
  key head, rows = the queries of its group side by side, or the keys.

  Whole arrays are never turned: a block must be copied out of them anyway.
  """
  x = lax.dynamic_slice_in_dim(x, index * block, block, axis)
  if axis == 1:
    x = x.transpose(0, 2, 3, 1, 4) if x.ndim == 5 else x.swapaxes(1, 2)
  return x.reshape(x.shape[0] * x.shape[1], -1, *x.shape[4 if axis == 3 or x.ndim == 5 else 3 :])


class _Tile:
  """One tile of one call: a block of queries and one or more blocks of keys; its scores and mask.

  Matrix products see `r gq k`: r = batch and key head, gq = the queries of the group side by side.
  So written, each is one batched product whose operands and result lie as XLA wants them; with five
  axes it turned a whole tile between a product and a sum. Masks and modifiers see `B K G q k`, the
  same numbers under another name.
  """

  def __init__(self, settings: Settings, heads: tuple[int, int, int], i: Array, js: list[Array]):
    self.settings, self.heads, self.q_block, self.k_blocks = settings, heads, i, js
    self.q_idx = _positions(i, settings.block_q)
    self.k_idx = jnp.concatenate([_positions(j, settings.block_k) for j in js])

  def keys(self, x: Array) -> Array:
    """The keys or values of the tile, `r k H`, of an array `B S K H`."""
    blocks = [_heads_first(x, 1, j, self.settings.block_k) for j in self.k_blocks]
    return jnp.concatenate(blocks, 1) if len(blocks) > 1 else blocks[0]

  def part(self, modifiers: Modifiers) -> Modifiers:
    """The modifiers with the bias of this tile alone."""
    if modifiers.bias is None:
      return modifiers
    parts = [self._of(modifiers.bias, j) for j in self.k_blocks]
    whole = jnp.concatenate(parts, 3) if modifiers.bias.shape[3] > 1 else parts[0]
    return modifiers._replace(bias=whole)

  def _of(self, x: Array, j: Array) -> Array:
    block_q, block_k = self.settings.block_q, self.settings.block_k
    return scores.tile_of(x, (self.q_block * block_q, block_q), (j * block_k, block_k))

  def modify(self, product: Array, modifiers: Modifiers) -> Array:
    """The scores `r gq k`, unmasked, float32, of their products; the modifiers are those of
    `part`.
    """
    scale, cap = self.settings.scale, self.settings.logit_cap
    if scale == 1.0 and cap is None and not jax.tree.leaves(modifiers):
      return product
    product = product.reshape(*self.heads, self.settings.block_q, -1)
    score = scores.modify(product, modifiers, self.q_idx, self.k_idx, scale=scale, logit_cap=cap)
    return self._flat(score)

  def allowed(self, mask: Mask) -> Array:
    """Who may attend in this tile: bool, `r gq k`, or with 1 for r where all rows are alike."""
    allowed = scores.grouped(jnp.asarray(mask(self.q_idx, self.k_idx)), self.heads[1])
    rows = self.heads if allowed.shape[:3] != (1, 1, 1) else (1, 1, self.heads[2])
    return self._flat(jnp.broadcast_to(allowed, (*rows, *allowed.shape[3:])))

  def keep(self, seeds: Array) -> Array:
    """What dropout keeps: bool, `r gq k`."""
    rate = self.settings.dropout_rate
    seeds = seeds.reshape(*self.heads, 1, 1)
    idx = (
      x.reshape(1, 1, 1, *shape) for x, shape in ((self.q_idx, (-1, 1)), (self.k_idx, (1, -1)))
    )
    return self._flat(dropout.keep(seeds, *idx, rate=rate))

  def add(self, total: Modifiers, part: Modifiers) -> Modifiers:
    """The gradient of the modifiers with that of this tile, of one block of keys, added where it
    belongs.
    """
    bias, slopes = total
    if bias is not None and part.bias is not None:
      (j,) = self.k_blocks
      starts = (self.q_block * self.settings.block_q, j * self.settings.block_k)
      starts = tuple(x if size > 1 else 0 for x, size in zip(starts, bias.shape[2:], strict=True))
      new = self._of(bias, j) + part.bias.astype(jnp.float32)
      bias = lax.dynamic_update_slice(bias, new, (0, 0, *starts))
    if slopes is not None and part.alibi_slopes is not None:
      slopes = slopes + part.alibi_slopes.astype(jnp.float32)
    return Modifiers(bias, slopes)

  def _flat(self, tile: Array) -> Array:
    """`B K G q k` as `r gq k`."""
    return tile.reshape(-1, tile.shape[2] * tile.shape[3], tile.shape[4])


def _positions(index: Array, block: int) -> Array:
  return index * block + jnp.arange(block, dtype=jnp.int32)


def _forward(settings, q, k, v, modifiers, sinks, mask, seeds):
  """(out `B T K G h` float32, lse `B K G T`) of q `B T K G H`, k `B S K H`, v `B S K h`."""
  B, T, K, G, _ = q.shape
  by_query, _ = schedule(mask, T, k.shape[1], settings)
  order, full, active = map(jnp.asarray, by_query)
  block_q = settings.block_q
  zero = loops.zero((q, k, v, modifiers, sinks, mask, seeds))

  def row(i):
    q_tile = _heads_first(q, 1, i, block_q) * jnp.asarray(settings.q_scale, q.dtype)

    def visit(n, state, mask, pair=1):
      tile = _Tile(settings, (B, K, G), i, [order[i, n * pair + x] for x in range(pair)])
      s = tile.modify(_sum("rqh,rsh->rqs", q_tile, tile.keys(k)), tile.part(modifiers))
      s = s if mask is None else jnp.where(tile.allowed(mask), s, -jnp.inf)
      keep = None if seeds is None else tile.keep(seeds)
      return online_softmax.update(state, s, tile.keys(v), "rqs,rsh->rqh", keep)

    state = online_softmax.start((B * K, G * block_q), v.shape[-1])
    state = jax.tree.map(lambda x: x + zero, state)
    if sinks is not None:
      sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, G, 1), (B, K, G, block_q))
      state = state._replace(m=sink.reshape(state.m.shape) + zero, l=jnp.ones_like(state.l))
    pairs = full[i] // PAIR
    state = lax.fori_loop(0, pairs, functools.partial(visit, mask=None, pair=PAIR), state)
    state = lax.fori_loop(pairs * PAIR, full[i], functools.partial(visit, mask=None), state)
    state = lax.fori_loop(full[i], active[i], functools.partial(visit, mask=mask), state)
    out, lse = online_softmax.finish(state)
    out = out.reshape(B, K, G, block_q, -1) / (1.0 - settings.dropout_rate)
    return out.transpose(0, 3, 1, 2, 4), lse.reshape(B, K, G, block_q)

  out, lse = lax.map(row, jnp.arange(T // block_q, dtype=jnp.int32))
  return _joined(out, 1), _joined(lse, 3)


def _joined(blocks: Array, axis: int) -> Array:
  """The blocks, stacked along the first axis, as parts of `axis`."""
  blocks = jnp.moveaxis(blocks, 0, axis)
  return blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])


def _backward(settings, modifiers, mask, q, k, v, d_out, lse, delta, seeds):
  """(dq, dk, dv, dmodifiers), all float32. An empty row comes with lse = +inf, so that its
  probabilities are 0.

  Tiles lie keys first, `r k gq`, and dQ is summed transposed, `r H gq`: so laid out, every product
  reads its operands row by row, on a CPU 2 to 3 times faster than otherwise.
  """
  B, T, K, G, H = q.shape
  _, by_key = schedule(mask, T, k.shape[1], settings)
  order, full, active = map(jnp.asarray, by_key)
  block_q, block_k = settings.block_q, settings.block_k
  zero = loops.zero((q, k, v, modifiers, mask, d_out, lse, seeds))
  kept = 1.0 / (1.0 - settings.dropout_rate)

  def column(carry, j):
    k_tile, v_tile = (_heads_first(x, 1, j, block_k) for x in (k, v))
    # float32: XLA's CPU backend has no product of two bfloat16 that sums over rows.
    k_turned = k_tile.swapaxes(1, 2).astype(jnp.float32)

    def visit(n, carry, mask):
      dk, dv, dq, d_modifiers = carry
      i = order[j, n]
      tile = _Tile(settings, (B, K, G), i, [j])
      q_tile, d_tile = (_heads_first(x, 1, i, block_q) for x in (q, d_out))
      q_tile = q_tile * jnp.asarray(settings.q_scale, q.dtype)
      lse_tile, delta_tile = (_heads_first(x, 3, i, block_q)[:, None] for x in (lse, delta))
      modify = lambda product, part: tile.modify(product.swapaxes(1, 2), part).swapaxes(1, 2)
      s, pull = jax.vjp(modify, _sum("rsh,rqh->rsq", k_tile, q_tile), tile.part(modifiers))
      s = s if mask is None else jnp.where(tile.allowed(mask).swapaxes(1, 2), s, -jnp.inf)
      p = exp(s - lse_tile)
      dp = _sum("rsh,rqh->rsq", v_tile, d_tile)
      used = p
      if seeds is not None:
        keep = tile.keep(seeds).swapaxes(1, 2)
        used, dp = (jnp.where(keep, x * kept, 0.0) for x in (p, dp))
      dv += _sum("rsq,rqh->rsh", used, d_tile)
      d_product, d_part = pull(p * (dp - delta_tile))
      dk += _sum("rsq,rqh->rsh", d_product, q_tile)
      new = _sum("rhs,rsq->rhq", k_turned, d_product).reshape(B * K, H, G, block_q)
      dq_tile = lax.dynamic_slice_in_dim(dq, i * block_q, block_q, 3) + new
      dq = lax.dynamic_update_slice_in_dim(dq, dq_tile, i * block_q, 3)
      return dk, dv, dq, tile.add(d_modifiers, d_part)

    state = (_zeros(k_tile) + zero, _zeros(v_tile) + zero, *carry)
    state = lax.fori_loop(0, full[j], functools.partial(visit, mask=None), state)
    state = lax.fori_loop(full[j], active[j], functools.partial(visit, mask=mask), state)
    return state[2:], tuple(x.reshape(B, K, block_k, -1).swapaxes(1, 2) for x in state[:2])

  dq = jnp.zeros((B * K, H, G, T), jnp.float32)
  start = jax.tree.map(lambda x: x + zero, (dq, jax.tree.map(_zeros, modifiers)))
  blocks = jnp.arange(k.shape[1] // block_k, dtype=jnp.int32)
  (dq, d_modifiers), (dk, dv) = lax.scan(column, start, blocks)
  dq = dq.reshape(B, K, H, G, T).transpose(0, 4, 1, 3, 2) * settings.q_scale
  return dq, _joined(dk, 1), _joined(dv, 1), d_modifiers


def _zeros(x: Array) -> Array:
  return jnp.zeros(x.shape, jnp.float32)


def _sum(contract: str, x: Array, y: Array) -> Array:
  """A matrix product in the precision of the narrower operand, with a float32 sum."""
  dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
  return jnp.einsum(contract, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
