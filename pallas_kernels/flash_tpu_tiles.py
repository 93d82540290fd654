"""What the passes of flash attention on a TPU share: where a step is, what it reads, its tiles.

A grid runs over heads and over `Steps`: the visits of `flash.Visits` written one after another, so
that what is not visited costs neither a copy nor a step. A step is one int32 in scalar memory,
which the copies of the next step read ahead of it.

Rows of `#B #N 1 T` or `#B #N 1 S` hold what belongs to a query or to a key; a tile of scores needs
them along sublanes or along lanes, and the one that does not fit is transposed in registers.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles
from pallas_kernels.flash import Extras, Settings, Visits

Array = jax.Array
Ref = Any

LANES = 128
MAX_BLOCKS, MAX_GROUPS, MAX_STEPS = 2**11, 2**5, 2**17
"""What a step's int32 has room for, and the steps that half of the scalar memory has room for."""

MAX_SCALARS = MAX_STEPS + MAX_STEPS // 2
"""The steps and the seeds of dropout together: three quarters of it."""

UNROLLED = 1024
"""The side of the largest block whose parts are straight code."""

_FIELDS = {"row": (0, 11), "other": (11, 11), "group": (22, 5)}
_FLAGS = {"full": 27, "mixed": 28, "first": 29, "last": 30}


def cdiv(x: int, y: int) -> int:
  """x / y rounded up."""
  return -(-x // y)


def padded(x: Array, axis: int, multiple: int) -> Array:
  """Zeros to a multiple: what is read beyond the end must be finite."""
  missing = -x.shape[axis] % multiple
  widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths) if missing else x


class Steps(NamedTuple):
  """The visits of one axis as a list, for every (batch row or one) x (head or one)."""

  words: Array
  """int32, the lists of all rows and heads one after another, each as long as the longest."""
  length: int | Array
  """The steps of the longest list: a number where the visits are known before anything runs."""
  batch: int
  heads: int

  def word(self, words_ref: Ref, b: Array, n: Array, s: Array) -> Array:
    """Step s of the list of row b, head n."""
    row = (b if self.batch > 1 else 0) * self.heads + (n if self.heads > 1 else 0)
    return words_ref[row * (self.words.shape[0] // (self.batch * self.heads)) + s]


def steps(visits: Visits, groups: int = 1) -> Steps:
  """The list of the visits. With `groups`, the visits of that many heads in turn, block by block:
  of all queries that share a key head, one key block after another.

  A block that visits nothing still has a step, in which its empty result is written.
  """
  static = not any(isinstance(x, jax.core.Tracer) for x in visits)
  xp: Any = np if static else jnp
  order, full, active = (xp.asarray(x, dtype=xp.int32) for x in visits)
  batch, heads, blocks, others = order.shape
  grouped = lambda x: x.reshape(batch, heads // groups, groups, *x.shape[2:]).swapaxes(2, 3)
  order = grouped(order).reshape(batch, -1, blocks * groups * others)
  full, active = (grouped(x).reshape(batch, -1, blocks * groups) for x in (full, active))
  counts = xp.maximum(active, 1)
  ends = counts.cumsum(-1)
  longest = ends[..., -1].max()
  at = xp.arange(int(longest) if static else blocks * groups * others, dtype=xp.int32)
  row = (at[None, None, :, None] >= ends[:, :, None, :]).sum(-1, dtype=xp.int32)
  row = xp.minimum(row, blocks * groups - 1)
  of = lambda x: xp.take_along_axis(x, row, -1)
  at = at[None, None]
  nth = xp.minimum(at - (of(ends) - of(counts)), of(counts) - 1)
  inside = at < ends[..., -1:]
  other = xp.take_along_axis(order, row * others + nth, -1)
  other = xp.where(nth < of(active), xp.clip(other, 0, others - 1), 0)
  values = {"row": row // groups, "other": other, "group": row % groups}
  flags = {
    "full": nth < of(full),
    "mixed": (nth >= of(full)) & (nth < of(active)),
    "first": (nth == 0) & (row % groups == 0),
    "last": (nth == of(counts) - 1) & (row % groups == groups - 1),
  }
  parts = [values[name].astype(xp.int32) << at for name, (at, _) in _FIELDS.items()]
  parts += [(inside & flags[name]).astype(xp.int32) << at for name, at in _FLAGS.items()]
  words = functools.reduce(operator.or_, parts)
  length = int(longest) if static else longest.astype(jnp.int32)
  return Steps(jnp.asarray(words.reshape(-1), jnp.int32), length, batch, heads // groups)


def field(word: Array, name: str) -> Array:
  """A step's block of the axis walked (`row`), the block that it visits (`other`), its `group`."""
  at, bits = _FIELDS[name]
  return lax.shift_right_logical(word, jnp.int32(at)) & jnp.int32(2**bits - 1)


def flag(word: Array, name: str) -> Array:
  """Whether a step is `full` or `mixed`, the `first` or the `last` of its block."""
  return (word & jnp.int32(1 << _FLAGS[name])) != 0


class Place(NamedTuple):
  """Where a step is: batch row, query head, query block, key block."""

  b: Array
  n: Array
  i: Array
  j: Array


class Operand(NamedTuple):
  """An array that a kernel reads in blocks, and of which axes they are.

  `query`: `B N T W`; `key`: `B K S W`; `q_row`: `#B #N R T`; `k_row`: `#B #N 1 S`; `tile`: `#B #N T
  S`; `scalar`: any, whole, in scalar memory. Inside a kernel the array is the ref of a block.
  """

  kind: str
  array: Any

  def spec(self, block: tuple[int, int], group: int, where: Callable[..., Place]) -> pl.BlockSpec:
    """How its blocks follow the steps."""
    if self.kind == "scalar":
      return pl.BlockSpec(memory_space=pltpu.SMEM)
    block_q, block_k = block
    B, N, rows, width = self.array.shape
    shape, head, last = {
      "query": ((block_q, width), lambda p: p.n, lambda p: (p.i, 0)),
      "key": ((block_k, width), lambda p: lax.div(p.n, jnp.int32(group)), lambda p: (p.j, 0)),
      "q_row": ((rows, block_q), lambda p: p.n if N > 1 else 0, lambda p: (0, p.i)),
      "k_row": ((1, block_k), lambda p: p.n if N > 1 else 0, lambda p: (0, p.j)),
      "tile": ((block_q, block_k), lambda p: p.n if N > 1 else 0, lambda p: (p.i, p.j)),
    }[self.kind]

    def index(*ids):
      place = where(*ids)
      return (place.b if B > 1 else 0, head(place), *last(place))

    return pl.BlockSpec((None, None, *shape), index)


def modifiers(extras: Extras, T: int, S: int, block: tuple[int, int]) -> dict[str, Operand]:
  """What changes scores and decides about pairs, by name, each in the smallest form that it has."""
  scalars = {"slopes": extras.alibi_slopes, "sinks": extras.sinks, "seeds": extras.dropout_seeds}
  found = {n: Operand("scalar", x.reshape(-1)) for n, x in scalars.items() if x is not None}
  if extras.bias is not None:
    known = extras.bias.dtype in (jnp.float32, jnp.bfloat16)  # Mosaic loads no float16.
    bias = extras.bias if known else extras.bias.astype(jnp.float32)
    found["bias"] = _broadcastable(bias, T, S, block)
  for n, info in enumerate(extras.q_info):
    found[f"q_info{n}"] = Operand("q_row", padded(info[:, None, None], 3, block[0]))
  for n, info in enumerate(extras.k_info):
    found[f"k_info{n}"] = Operand("k_row", padded(info[:, None, None], 3, block[1]))
  for n, mask in enumerate(extras.dense):
    tile = mask.shape[2] == T > 1 and mask.shape[3] == S > 1
    mask = mask.astype(jnp.int8 if tile else jnp.int32)
    found[f"dense{n}"] = _broadcastable(mask, T, S, block)
  return found


def _broadcastable(x: Array, T: int, S: int, block: tuple[int, int]) -> Operand:
  """`#B #N #T #S` as a tile, or as a row where it has one query or one key."""
  if x.shape[2] == 1:
    x = jnp.broadcast_to(x, (*x.shape[:3], S))
    return Operand("k_row", padded(x, 3, block[1]))
  if x.shape[3] == 1:
    return Operand("q_row", padded(x.swapaxes(2, 3), 3, block[0]))
  return Operand("tile", padded(padded(x, 2, block[0]), 3, block[1]))


class Tile(NamedTuple):
  """A part of a step's block of scores, `q k` or, keys first, `k q`."""

  settings: Settings
  refs: Mapping[str, Operand]
  place: Place
  block: tuple[int, int]
  heads: int
  first: tuple[Any, Any]
  """The part's first query and first key within the block."""
  size: tuple[int, int]
  keys_first: bool

  @property
  def shape(self) -> tuple[int, int]:
    """That of the part, as it lies in registers."""
    return self.size[::-1] if self.keys_first else self.size

  def queries(self) -> pl.Slice:
    """Its queries among those of the block."""
    return pl.ds(self.first[0], self.size[0])

  def keys(self) -> pl.Slice:
    """Its keys among those of the block."""
    return pl.ds(self.first[1], self.size[1])

  def positions(self) -> tuple[Array, Array]:
    """(q_idx, k_idx) of its pairs."""
    axes = (1, 0) if self.keys_first else (0, 1)
    iota = (lax.broadcasted_iota(jnp.int32, self.shape, axis) for axis in axes)
    blocks = (self.place.i, self.place.j)
    q_idx, k_idx = (
      x + (index * size + start)
      for x, index, size, start in zip(iota, blocks, self.block, self.first, strict=True)
    )
    return q_idx, k_idx

  def scores(self, product: Array) -> tuple[Array, Array | None]:
    """(score2, tanh) of its dot products, unmasked."""
    slope = distance = None
    if "slopes" in self.refs:
      slope, distance = self.scalar("slopes", self.place.n), tiles.distance(*self.positions())
    return tiles.scores(
      product,
      scale=self.settings.scale,
      logit_cap=self.settings.logit_cap,
      bias=self.of("bias") if "bias" in self.refs else None,
      slope=slope,
      distance=distance,
    )

  def masked(self, score2: Array) -> Array:
    """-inf where the rule says no."""
    of = lambda kind: [self.of(name) for name in self.refs if name.startswith(kind)]
    dense = tuple(x.astype(jnp.int32) != 0 for x in of("dense"))
    rule = self.settings.rule
    allowed = rule(*self.positions(), tuple(of("q_info")), tuple(of("k_info")), dense)
    return jnp.where(allowed, score2, -jnp.inf)

  def kept(self) -> Array | None:
    """What dropout keeps, None where it keeps all."""
    if not self.settings.dropout_rate:
      return None
    seed = self.scalar("seeds", self.place.b * self.heads + self.place.n)
    return tiles.keep(seed, *self.positions(), rate=self.settings.dropout_rate)

  def scalar(self, name: str, index: Array) -> Array:
    """One number of scalar memory."""
    return self.refs[name].array[index]

  def of(self, name: str) -> Array:
    """A modifier's part, broadcast to the tile."""
    kind, ref = self.refs[name]
    if kind == "tile":
      x = ref[self.queries(), self.keys()]
      x = x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
      return x.T if self.keys_first else x
    row = ref[:, self.queries() if kind == "q_row" else self.keys()]
    row = row if row.dtype == jnp.int32 else row.astype(jnp.float32)
    if (kind == "q_row") == self.keys_first:
      return jnp.broadcast_to(row, self.shape)
    column = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return across(column, self.shape[1])


def across(x: Array, width: int) -> Array:
  """`rows LANES`, all lanes alike, to `rows width`."""
  return jnp.tile(x, (1, cdiv(width, LANES)))[:, :width]


def row(x: Array) -> Array:
  """`rows LANES`, all lanes alike, to `1 rows`: a transposition by selections, since the vector
  unit has more to spare than the cross-lane unit.
  """
  lane = lax.broadcasted_iota(jnp.int32, (8, LANES), 1)
  own = lane % 8 == lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
  found = []
  for first in range(0, x.shape[0], LANES):
    tile = x[first : first + 8]
    for at in range(8, LANES, 8):
      tile = jnp.where(lane >= at, x[first + at : first + at + 8], tile)
    found.append(jnp.where(own, tile, 0.0).sum(0, keepdims=True))
  return jnp.concatenate(found, 1)


def dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
  """The product of two matrices over one axis of each, summed in float32."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
  dims = (((contract[0],), (contract[1],)), ((), ()))
  return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def inputs(q: Array, k: Array, v: Array, block: tuple[int, int]) -> dict[str, Operand]:
  """q, k, v with time before heads swapped, padded to whole blocks and to heads of whole halves of
  the lanes.
  """
  block_q, block_k = block
  head = lambda x, side: padded(padded(x.swapaxes(1, 2), 2, side), 3, LANES // 2)
  return {
    "q": Operand("query", head(q, block_q)),
    "k": Operand("key", head(k, block_k)),
    "v": Operand("key", head(v, block_k)),
  }


def gradients(
  d_out: Array, base: Array, delta: Array, block: tuple[int, int]
) -> dict[str, Operand]:
  """What the backward passes read besides, of `flash.Rows`.

  Queries of the padding have the base +inf like those that see nothing: probabilities of 0.
  """
  d_out = padded(d_out.swapaxes(1, 2), 2, block[0])
  missing = d_out.shape[2] - base.shape[2]
  base = jnp.pad(base, ((0, 0), (0, 0), (0, missing)), constant_values=jnp.inf)
  return {
    "d_out": Operand("query", padded(d_out, 3, LANES // 2)),
    "base": Operand("q_row", base[:, :, None]),
    "delta": Operand("q_row", padded(delta[:, :, None], 3, block[0])),
  }


def named(operands: Mapping[str, Operand], refs: tuple[Ref, ...]):
  """The refs of a kernel as (its inputs by name, the others)."""
  mine = {n: Operand(x.kind, ref) for (n, x), ref in zip(operands.items(), refs, strict=False)}
  return mine, refs[len(operands) :]


def dropped(x: Array, kept: Array | None) -> Array:
  """0 where dropout keeps nothing. What it keeps is to be divided by 1 - rate."""
  return x if kept is None else jnp.where(kept, x, 0.0)


def part(side: int, most: int) -> int:
  """The longest part of at most `most` that divides a side, a multiple of the lanes."""
  return max(x for x in range(LANES, most + 1, LANES) if side % x == 0)


def parts(block: tuple[int, int], most: tuple[int, int] = (512, 512)) -> tuple[int, int]:
  """The size of the parts of a block."""
  return part(block[0], most[0]), part(block[1], most[1])


def walk(
  block: tuple[int, int], size: tuple[int, int], make, products, use, *, ahead: bool = True
) -> None:
  """`use(tile, products(tile))` for each part of a block; `ahead`, the next part's products asked
  for before this one's are used: so the matrix unit works while the vector unit does.

  All parts of `UNROLLED` are one piece of straight code; a larger block is a loop over such pieces.
  """
  piece = tuple(min(side, UNROLLED) for side in block)
  counts = tuple(side // x for side, x in zip(block, piece, strict=True))

  def straight(at: tuple[Any, Any]) -> None:
    offsets = ((a, c) for a in range(0, piece[0], size[0]) for c in range(0, piece[1], size[1]))
    parts = [make((at[0] + a, at[1] + c)) for a, c in offsets]
    if not ahead:
      for this in parts:
        use(this, products(this))
      return
    product = products(parts[0])
    for this, following in zip(parts, [*parts[1:], None], strict=True):
      next_product = None if following is None else products(following)
      use(this, product)
      product = next_product

  def body(n, _):
    a, c = lax.div(n, jnp.int32(counts[1])), lax.rem(n, jnp.int32(counts[1]))
    straight((pl.multiple_of(a * piece[0], piece[0]), pl.multiple_of(c * piece[1], piece[1])))

  if counts == (1, 1):
    straight((0, 0))
  else:
    lax.fori_loop(0, counts[0] * counts[1], body, None)


def compiler_params(*semantics: Any) -> Any:
  """How the axes of the grid may be walked, and the vector memory that any of the chips has.

  Every copy is of a whole block of an array padded to whole blocks, so its bounds are not checked
  on the chip, where a TPU7x takes 20 cycles for it; the interpreter checks them.
  """
  return pltpu.CompilerParams(
    dimension_semantics=semantics, vmem_limit_bytes=48 * 2**20, disable_bounds_checks=True
  )
