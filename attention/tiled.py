"""Softmax attention in tiles: O(T + S) memory forward and backward, pure XLA, so it runs on
anything.

The forward pass walks the queries block by block; for each it visits the key blocks that the mask
leaves, those that are full without a mask and then what is not empty of those that are mixed, and
keeps a running softmax. Of the T x S scores only one tile exists at a time, of all heads where the
cores of a CPU share it, of one head where each has a device of its own. Nothing is saved for the
backward pass but the inputs, the output, and of each row the greatest score m and the sum l of
e^(score - m). (Their log-sum-exp m + log l would not do: beside a great m nothing is left of log
l.) It walks the key blocks, recomputes each tile's probabilities p = e^(score - m - log l), and
adds up

    dV += p^T dO     dS = p (dO V^T - delta)     delta = rowsum(dO O) - dlse
    dQ += dS K       dK += dS^T Q

Dao et al. 2022, algorithm 4, https://arxiv.org/abs/2205.14135; the log-sum-exp has a gradient too.
Which blocks to visit comes from `Mask.block`, in O(blocks), so a window costs what is in the
window, forward and backward. The order of the sums is fixed: two runs give the same bits.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention import chips, dropout, loops, masks, online_softmax, parts, scores
from attention.exponential import exp
from attention.masks import Mask, Span
from attention.parts import Part
from attention.scores import Modifiers
from attention.types import Array

MAX_BLOCK = 512
"""The longest side of a tile."""

SHARED = 2**20
"""The scores of a visit, all rows and heads together: 4 MiB, what the caches of several cores hold;
each core takes a part of every product.
"""
OF_A_CORE = 2**16
"""256 KiB, what a core's own cache holds."""

_QUARTERED = 256
"""The shortest side of a block that is visited in quarters."""


class Tiling(NamedTuple):
  """How the work is cut up."""

  block_q: int
  block_k: int
  quarters: bool = False
  """Whether the forward pass visits a mixed block in quarters, and only those that are not empty:
  less work in more products.
  """
  rows: int = 1
  """Rows of the batch that go side by side."""
  heads: int = 1
  """Key heads that do, each with the queries of its group."""

  def halved(self) -> "Tiling":
    """The same with quarters for blocks."""
    return self._replace(block_q=self.block_q // 2, block_k=self.block_k // 2)


class Settings(NamedTuple):
  """What is known before anything runs."""

  scale: float
  logit_cap: float | None
  tiling: Tiling
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


def schedule(mask: Mask, T: int, S: int, tiling: Tiling) -> tuple[Schedule, Schedule]:
  """The visits of each query block and of each key block. O(blocks) time and memory."""
  some, every = _blocks(mask, T, S, tiling)
  return _visits(some, every), _visits(some.T, every.T)


def quarters(mask: Mask, T: int, S: int, tiling: Tiling) -> Schedule:
  """The visits of each query block to quarters of its mixed blocks, none of them full: half `a` of
  the queries and half block `b` of the keys are number `a n + b`, n half blocks of keys.
  """
  every = _blocks(mask, T, S, tiling)[1]
  some = _blocks(mask, T, S, tiling.halved())[0] & ~every.repeat(2, 0).repeat(2, 1)
  some = some.reshape(every.shape[0], -1)
  return _visits(some, some & ~some)


def _blocks(mask: Mask, T: int, S: int, tiling: Tiling) -> tuple[masks.Array, masks.Array]:
  """Whether some pair of a block is allowed, and whether every one is, for all rows and heads."""
  some, every = mask.block(Span.blocks(T, tiling.block_q), Span.blocks(S, tiling.block_k))
  return some.any((0, 1)), every.all((0, 1))


def _visits(some: masks.Array, every: masks.Array) -> Schedule:
  xp = np if isinstance(some, np.ndarray) else jnp
  state = xp.where(every, 0, xp.where(some, 1, 2))
  order = xp.argsort(state, axis=1, stable=True).astype(np.int32)
  return Schedule(order, (state == 0).sum(1, dtype=np.int32), (state < 2).sum(1, dtype=np.int32))


def choose(mask: Mask, q: tuple[int, ...], k: tuple[int, ...], cache: int) -> Tiling:
  """Of queries `B T N ...` and keys `B S K ...`: the largest block that the cache allows one head
  or all, smaller where that lets a static mask skip more, and as many heads and rows as fit.
  """
  (B, T, N, *_), (_, S, K, *_) = q, k
  group, least = N // K, 1 if cache == OF_A_CORE else K
  sizes = [b for b in (MAX_BLOCK, 256, 128) if least * group * b * b <= cache or b == 128]
  longest = max(T, S)

  def work(b: int) -> float:
    """Visited pairs, and what a visit costs besides: about that of 64 x 64 pairs."""
    some = mask.block(Span.blocks(T, b), Span.blocks(S, b)).any
    return float(some.sum()) * (b * b + 64 * 64)

  skips = mask.is_static and sizes[-1] < longest <= 2**16
  block = min(sizes, key=work) if skips else sizes[0]
  block_q, block_k = (min(block, -(-length // 8) * 8) for length in (T, S))
  known = parts.devices()
  devices = known or jax.device_count()
  fit = (known or 1) * cache // (group * block_q * block_k)
  heads = parts.side(K, devices, max(fit // math.gcd(B, devices), least))
  rows = parts.side(B, devices, fit // heads if heads == K else 1)
  return Tiling(block_q, block_k, min(block_q, block_k) >= _QUARTERED, rows, heads)


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
  tiling: Tiling | None = None,
) -> tuple[Array, Array]:
  """The output `B T N h` and the log-sum-exp `B N T`, float32, of q `B T N H`, k `B S K H`, v `B S
  K h`; the seeds of dropout are int32 `B N`.
  """
  B, T, N, _ = q.shape
  S, K, h = v.shape[1:]
  if tiling is None:
    tiling = choose(mask, q.shape, k.shape, OF_A_CORE if chips.has_one_core() else SHARED)
  block_q, block_k, *_ = tiling
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
  settings = Settings(logit_cap=logit_cap, tiling=tiling, dropout_rate=dropout_rate, **scales)
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
  out, m, l = _forward(settings, q, k, v, modifiers, sinks, mask, seeds)
  lse = online_softmax.log_sum_exp(m, l)
  return (out, lse), (q, k, v, modifiers, sinks, mask, seeds, out, m, l)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_backward(settings, saved, gradients):
  q, k, v, modifiers, sinks, mask, seeds, out, m, l = saved
  d_out, d_lse = gradients
  delta = jnp.einsum("btkgh,btkgh->bkgt", d_out, out) - d_lse
  empty = l == 0.0
  row = jnp.where(empty, jnp.inf, m), jnp.log(jnp.where(empty, 1.0, l)), delta
  d_sinks = None
  if sinks is not None:
    share = jnp.exp(sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1) - row[0] - row[1])
    d_sinks = -(share * delta).sum((0, 3)).reshape(sinks.shape).astype(sinks.dtype)

  gradients = _backward(settings, q, k, v, d_out.astype(v.dtype), row, modifiers, mask, seeds)
  dq, dk, dv, d_modifiers = jax.tree.map(
    lambda gradient, x: gradient.astype(x.dtype), gradients, (q, k, v, modifiers)
  )
  return dq, dk, dv, d_modifiers, d_sinks, None, None


@_attend_backward.defjvp
def _no_second_derivative(settings, primals, tangents):
  raise NotImplementedError(
    "'tiled' is differentiable once, its backward pass recomputes and saves nothing; "
    "implementation='xla' has derivatives of every order in O(T S) memory"
  )


_attend.defvjp(_attend_forward, _attend_backward)


def _in_parts[R](
  tiling: Tiling, q: Array, run: Callable[[Mapping[str, Part], R], R], start: R
) -> R:
  """`run(cut, results)` for one part of the rows B and heads K of `q` after the other."""
  B, _, K, *_ = q.shape
  columns = K // tiling.heads
  count = B // tiling.rows * columns

  def one(n, results):
    rows, heads = Part(B, tiling.rows, n // columns), Part(K, tiling.heads, n % columns)
    return run({"B": rows, "K": heads}, results)

  return one(0, start) if count == 1 else lax.fori_loop(0, count, one, start)


def _padded(x: Array, axis: int, block: int) -> Array:
  """Zeros to a multiple of `block`: no query needs them and no key among them is allowed."""
  missing = -x.shape[axis] % block
  widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths) if missing else x


def _tokens(x: Array, layout: str, cut: Mapping[str, Part]) -> Array:
  """The block `B K tokens ...` of an array that lies as `layout` says; the queries of a group stand
  side by side as tokens.

  Whole arrays are never turned: a block must be copied out of them anyway.
  """
  x = parts.take(x, layout, cut)
  B, K, T, *rest = (layout.index(name) // 2 for name in "BKTG" if name in layout)
  x = x.transpose(B, K, *rest, T, *range(len(layout.split()), x.ndim))
  return x.reshape(*x.shape[:2], -1, *x.shape[len(layout.split()) :])


class _Tile:
  """One tile of one call: a block of queries and a block of keys; its scores and mask.

  Matrix products see `B K gq k`, gq = the queries of the group side by side. So written, each is
  one batched product whose operands and result lie as XLA wants them; with five axes it turned a
  whole tile between a product and a sum. Masks and modifiers see `B K G q k`, the same numbers
  under another name. B and K stay apart: joined, no mesh could cut the second.
  """

  def __init__(self, settings: Settings, group: int, cut: Mapping[str, Part]):
    cuts = settings.tiling
    self.settings, self.heads, self.cut = settings, (cuts.rows, cuts.heads, group), cut
    self.q_idx = _positions(cut["T"], cuts.block_q)
    self.k_idx = _positions(cut["S"], cuts.block_k)

  def keys(self, x: Array) -> Array:
    """The keys or values of the tile, `B K k H`, of a part's `B S K H`."""
    return _tokens(x, "B T K", {"T": self.cut["S"]})

  def part(self, modifiers: Modifiers) -> Modifiers:
    """The modifiers of this tile alone."""
    bias, slopes = modifiers
    bias = None if bias is None else parts.take(bias, "B K T S", self.cut)
    return Modifiers(bias, None if slopes is None else parts.take(slopes, "K", self.cut))

  def modify(self, product: Array, modifiers: Modifiers) -> Array:
    """The scores `B K gq k`, unmasked, float32, of their products; the modifiers are those of
    `part`.
    """
    scale, cap = self.settings.scale, self.settings.logit_cap
    if scale == 1.0 and cap is None and not jax.tree.leaves(modifiers):
      return product
    product = product.reshape(*self.heads, self.q_idx.shape[0], -1)
    score = scores.modify(product, modifiers, self.q_idx, self.k_idx, scale=scale, logit_cap=cap)
    return self._flat(score)

  def allowed(self, mask: Mask) -> Array:
    """Who may attend in this tile: bool, `B K gq k`, or with 1 for what is alike."""
    allowed = scores.grouped(jnp.asarray(mask(self.q_idx, self.k_idx)), self.heads[1])
    rows = self.heads if allowed.shape[:3] != (1, 1, 1) else (1, 1, self.heads[2])
    return self._flat(jnp.broadcast_to(allowed, (*rows, *allowed.shape[3:])))

  def keep(self, seeds: Array) -> Array:
    """What dropout keeps: bool, `B K gq k`."""
    rate = self.settings.dropout_rate
    seeds = seeds.reshape(*self.heads, 1, 1)
    idx = (
      x.reshape(1, 1, 1, *shape) for x, shape in ((self.q_idx, (-1, 1)), (self.k_idx, (1, -1)))
    )
    return self._flat(dropout.keep(seeds, *idx, rate=rate))

  def add(self, total: Modifiers, part: Modifiers) -> Modifiers:
    """The gradient of the modifiers with that of this tile added where it belongs."""

    bias, slopes = total
    if bias is not None and part.bias is not None:
      bias = parts.add(bias, "B K T S", self.cut, part.bias)
    if slopes is not None and part.alibi_slopes is not None:
      slopes = parts.add(slopes, "K", self.cut, part.alibi_slopes)
    return Modifiers(bias, slopes)

  def _flat(self, tile: Array) -> Array:
    """`B K G q k` as `B K gq k`."""
    return tile.reshape(*tile.shape[:2], -1, tile.shape[4])


def _positions(block: Part, width: int) -> Array:
  return block.index * width + jnp.arange(width, dtype=jnp.int32)


def _forward(settings, q, k, v, modifiers, sinks, mask, seeds):
  """(out `B T K G h`, m and l `B K G T`), float32, of q `B T K G H`, k `B S K H`, v `B S K h`."""
  B, T, K, G, _ = q.shape
  S, h = k.shape[1], v.shape[-1]
  block_q, block_k, in_quarters, rows, heads = settings.tiling
  zero = loops.zero((q, k, v, modifiers, sinks, mask, seeds))

  def part(cut, results):
    here = mask.part(cut["B"], cut["K"])
    order, full, active = map(jnp.asarray, schedule(here, T, S, settings.tiling)[0])
    k_part, v_part = (parts.take(x, "B S K", cut) for x in (k, v))
    seed = None if seeds is None else parts.take(seeds, "B K", cut)
    if in_quarters:
      fine, _, count = map(jnp.asarray, quarters(here, T, S, settings.tiling))
      fine_settings = settings._replace(tiling=settings.tiling.halved())

    def visit(settings, queries, q_tile, block, state, mask=None):
      keys = Part(S // settings.tiling.block_k, 1, block)
      tile = _Tile(settings, G, {**cut, "T": queries, "S": keys})
      s = tile.modify(_sum("bkqh,bksh->bkqs", q_tile, tile.keys(k_part)), tile.part(modifiers))
      s = s if mask is None else jnp.where(tile.allowed(mask), s, -jnp.inf)
      keep = None if seed is None else tile.keep(seed)
      return online_softmax.update(state, s, tile.keys(v_part), "bkqs,bksh->bkqh", keep)

    def row(i, results):
      queries = Part(T // block_q, 1, i)
      at = {**cut, "T": queries}
      q_tile = _tokens(q, "B T K G", at) * jnp.asarray(settings.q_scale, q.dtype)

      def whole(n, state, mask=None):
        return visit(settings, queries, q_tile, order[i, n], state, mask)

      def quarter(n, state):
        a, b = jnp.divmod(fine[i, n], 2 * S // block_k)
        half = functools.partial(_half, a, G)
        there = Part(2 * T // block_q, 1, 2 * i + a)
        return half(state, visit(fine_settings, there, half(q_tile), b, half(state), here))

      state = online_softmax.start(q_tile.shape[:3], h)
      state = jax.tree.map(lambda x: x + zero, state)
      if sinks is not None:
        sink = parts.take(sinks, "K", cut).astype(jnp.float32).reshape(1, heads, G, 1)
        sink = jnp.broadcast_to(sink, (rows, heads, G, block_q)).reshape(state.m.shape)
        none = sink == -jnp.inf
        state = state._replace(m=sink + zero, l=jnp.where(none, 0.0, 1.0) + zero)
      state = lax.fori_loop(0, full[i], whole, state)
      if in_quarters:
        state = lax.fori_loop(0, count[i], quarter, state)
      else:
        state = lax.fori_loop(full[i], active[i], functools.partial(whole, mask=here), state)
      out, _ = online_softmax.finish(state)
      out = out.reshape(rows, heads, G, -1, h).transpose(0, 3, 1, 2, 4)
      out = parts.put(results[0], "B T K", at, out / (1.0 - settings.dropout_rate))
      m, l = (parts.put(results[i + 1], "B K G T", at, state[i]) for i in range(2))
      return out, m, l

    return lax.fori_loop(0, T // block_q, row, results)

  rows_of_one = jnp.zeros((B, K, G, T), jnp.float32)
  start = jnp.zeros((B, T, K, G, h), jnp.float32), rows_of_one, rows_of_one
  return _in_parts(settings.tiling, q, part, jax.tree.map(lambda x: x + zero, start))


def _half[R](a: Array, group: int, tree: R, new: R | None = None) -> R:
  """Half `a` of the queries of arrays `B K gq ...`; or the arrays with `new` in its place."""
  half = {"T": Part(2, 1, a)}

  def move(x, *new):
    view = x.reshape(*x.shape[:2], group, -1, *x.shape[3:])
    view = parts.put(view, "B K G T", half, *new) if new else parts.take(view, "B K G T", half)
    return view.reshape(*x.shape[:2], -1, *x.shape[3:])

  return jax.tree.map(move, tree, *(() if new is None else (new,)))


def _backward(settings, q, k, v, d_out, row, modifiers, mask, seeds):
  """(dq, dk, dv, dmodifiers), all float32. `row` is m, log l and delta; an empty row comes with m =
  +inf, so that its probabilities are 0.

  Tiles lie keys first, `B K k gq`, and dQ is summed transposed, `B K H gq`: so laid out, every
  product reads its operands row by row, on a CPU 2 to 3 times faster than otherwise.
  """
  _, T, _, G, H = q.shape
  S = k.shape[1]
  block_q, block_k, _, rows, heads = settings.tiling
  zero = loops.zero((q, k, v, modifiers, mask, d_out, row, seeds))
  kept = 1.0 / (1.0 - settings.dropout_rate)

  def part(cut, results):
    here = mask.part(cut["B"], cut["K"])
    order, full, active = map(jnp.asarray, schedule(here, T, S, settings.tiling)[1])
    seed = None if seeds is None else parts.take(seeds, "B K", cut)

    def column(j, carry):
      keys = Part(S // block_k, 1, j)
      k_tile, v_tile = (_tokens(x, "B T K", {**cut, "T": keys}) for x in (k, v))
      # float32: XLA's CPU backend has no product of two bfloat16 that sums over rows.
      k_turned = k_tile.swapaxes(2, 3).astype(jnp.float32)

      def visit(n, carry, mask):
        dk, dv, dq, d_modifiers = carry
        queries = Part(T // block_q, 1, order[j, n])
        at = {**cut, "T": queries}
        tile = _Tile(settings, G, {**at, "S": keys})
        q_tile, d_tile = (_tokens(x, "B T K G", at) for x in (q, d_out))
        q_tile = q_tile * jnp.asarray(settings.q_scale, q.dtype)
        m, log_l, delta = (_tokens(x, "B K G T", at)[:, :, None] for x in row)
        modify = lambda product, part: tile.modify(product.swapaxes(2, 3), part).swapaxes(2, 3)
        s, pull = jax.vjp(modify, _sum("bksh,bkqh->bksq", k_tile, q_tile), tile.part(modifiers))
        s = s if mask is None else jnp.where(tile.allowed(mask).swapaxes(2, 3), s, -jnp.inf)
        p = exp(s - m - log_l)
        dp = _sum("bksh,bkqh->bksq", v_tile, d_tile)
        used = p
        if seed is not None:
          keep = tile.keep(seed).swapaxes(2, 3)
          used, dp = (jnp.where(keep, x * kept, 0.0) for x in (p, dp))
        dv += _sum("bksq,bkqh->bksh", used, d_tile)
        d_product, d_part = pull(p * (dp - delta))
        dk += _sum("bksq,bkqh->bksh", d_product, q_tile)
        new = _sum("bkhs,bksq->bkhq", k_turned, d_product).reshape(*dq.shape[:4], -1)
        dq = parts.add(dq, "B K H G T", {"T": queries}, new)
        return dk, dv, dq, tile.add(d_modifiers, d_part)

      dq, dk, dv, d_modifiers = carry
      state = (_zeros(k_tile) + zero, _zeros(v_tile) + zero, dq, d_modifiers)
      state = lax.fori_loop(0, full[j], functools.partial(visit, mask=None), state)
      state = lax.fori_loop(full[j], active[j], functools.partial(visit, mask=here), state)
      *tiles, dq, d_modifiers = state
      tiles = [x.swapaxes(1, 2) for x in tiles]
      at = {**cut, "T": keys}
      dk, dv = (parts.put(x, "B T K", at, new) for x, new in zip((dk, dv), tiles, strict=True))
      return dq, dk, dv, d_modifiers

    dq, *others = results
    one = jnp.zeros((rows, heads, H, G, T), jnp.float32) + zero
    one, *others = lax.fori_loop(0, S // block_k, column, (one, *others))
    one = one.transpose(0, 4, 1, 3, 2) * settings.q_scale
    return parts.put(dq, "B T K", cut, one), *others

  start = jax.tree.map(_zeros, (q, k, v, modifiers))
  return _in_parts(settings.tiling, q, part, jax.tree.map(lambda x: x + zero, start))


def _zeros(x: Array) -> Array:
  return jnp.zeros(x.shape, jnp.float32)


def _sum(contract: str, x: Array, y: Array) -> Array:
  """A matrix product in the precision of the narrower operand, with a float32 sum. float16 has no
  room for a probability or a gradient of float32: beside one of these it is widened.
  """
  dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
  dtype = jnp.float32 if dtype == jnp.float16 and x.dtype != y.dtype else dtype
  return jnp.einsum(contract, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
