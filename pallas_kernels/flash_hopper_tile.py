"""One tile of softmax attention on a Hopper GPU: which arrays decide about it, where it lies, its
scores, its mask. The kernels of `flash_hopper` and `flash_hopper_backward` are loops over it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles
from pallas_kernels.flash import Array, Extras, Settings
from pallas_kernels.hopper import COLUMN, ROW, ROWS, TILE, Plan, along, padded, pick


class Static(NamedTuple):
  """What a kernel knows before anything runs."""

  plan: Plan
  settings: Settings
  group: int
  """Query heads per key head."""
  blocks: int
  """In the grid."""
  on_chip: bool


_ROWS_OF_A_COPY = 8


def whole(x: Array) -> Array:
  """`B T N H` with zeros up to the padded head width, and up to whole rows of the 8 x 64 tiles in
  which a bulk copy writes: it refuses an array that ends within one.
  """
  rows, columns = -x.shape[1] % _ROWS_OF_A_COPY, padded(x.shape[-1]) - x.shape[-1]
  return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class Operand:
  """An array that is read tile by tile, cut so that whole numbers name a tile."""

  array: Any
  axis: int | None
  """None: a tile each of `#b #n rows ROWS columns width`. 0: a value per row, `#b #n rows ROWS`. 1:
  a value per column, `#b #n columns width`."""

  def load(self, b: Array, n: Array, row: Array, column: Array, width: int) -> Array:
    """The tile in this row and column of tiles."""
    where = pick(self.array, b, n)
    if self.axis is None:
      part = self.array.at[(*where, row, slice(None), column)]
      return plgpu.load(part, layout=TILE, optimized=False)
    part = self.array.at[(*where, column if self.axis else row)]
    x = plgpu.load(part, layout=COLUMN if self.axis else ROW, optimized=False)
    return along(x, self.axis, (ROWS, width))


def cut(x: Array, S: int, plan: Plan, *, keys_first: bool) -> Operand:
  """`#B #N #T #S` as an operand; in a tile the queries are the rows, or the keys."""
  if x.shape[2:] == (1, 1):
    x = jnp.broadcast_to(x, (*x.shape[:2], 1, S))
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.int8 if 1 not in x.shape[2:] else jnp.int32)
  x = x.swapaxes(2, 3) if keys_first else x
  R, C = x.shape[2:]
  rows, columns = plan.rows if R > 1 else 1, plan.others if C > 1 else 1
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -R % rows), (0, -C % columns)))
  if R == 1:
    return Operand(x.reshape(*x.shape[:2], -1, columns), 1)
  if C == 1:
    return Operand(x.reshape(*x.shape[:2], -1, ROWS), 0)
  return Operand(x.reshape(*x.shape[:2], -1, ROWS, x.shape[3] // columns, columns), None)


class Reads(NamedTuple):
  """The extras as kernels read them."""

  bias: Operand | None
  slopes: Array | None
  sinks: Array | None
  seeds: Array | None
  q_info: tuple[Operand, ...]
  k_info: tuple[Operand, ...]
  dense: tuple[Operand, ...]
  columns: Operand | None
  """The positions along the columns, or None: they are computed. Loops that compute them keep them
  in registers, one per column, which the accumulators of wide heads need.
  """

  @property
  def crowd(self) -> bool:
    """Whether a mixed tile needs registers for more than its scores and the positions: for a bias,
    arrays that the rule reads, dropout's bits.
    """
    return bool(self.bias or self.k_info or self.dense or self.seeds is not None)


def reads(
  extras: Extras,
  T: int,
  S: int,
  plan: Plan,
  *,
  keys_first: bool = False,
  load_positions: bool = False,
) -> Reads:
  """The extras, cut into the plan's tiles."""
  one, width = functools.partial(cut, S=S, plan=plan, keys_first=keys_first), plan.others
  float32 = lambda x: None if x is None else x.astype(jnp.float32)
  bias = extras.bias
  if bias is not None and 1 in bias.shape[2:]:
    bias = float32(bias)
  columns = jnp.arange(-(-(T if keys_first else S) // width) * width, dtype=jnp.int32)
  return Reads(
    None if bias is None else one(bias),
    float32(extras.alibi_slopes),
    float32(extras.sinks),
    extras.dropout_seeds,
    tuple(one(x[:, None, :, None]) for x in extras.q_info),
    tuple(one(x[:, None, None, :]) for x in extras.k_info),
    tuple(one(x) for x in extras.dense),
    Operand(columns.reshape(1, 1, -1, width), 1) if load_positions else None,
  )


class Tile:
  """One tile of one head: its scores, its mask, its dropout."""

  def __init__(
    self, settings: Settings, refs: Reads, b, n, row, column, width, *, keys_first=False
  ):
    self.settings, self.refs, self.shape, self.keys_first = (
      settings,
      refs,
      (ROWS, width),
      keys_first,
    )
    self.b, self.n, self.row, self.column = b, n, row, column

  def of(self, operand: Operand) -> Array:
    """This tile of an operand."""
    return operand.load(self.b, self.n, self.row, self.column, self.shape[1])

  def positions(self) -> tuple[Array, Array]:
    """(q_idx, k_idx) of every element."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, self.shape, layout=TILE)
    rows = iota(dimension=0) + self.row * self.shape[0]
    if self.refs.columns is None:
      columns = iota(dimension=1) + self.column * self.shape[1]
    else:
      columns = self.of(self.refs.columns)
    return (columns, rows) if self.keys_first else (rows, columns)

  def scores(self, product: Array) -> tuple[Array, float, Array | None]:
    """(x, factor, tanh): the scores in base 2 are factor x. A plain call's factor is left for the
    instruction that subtracts the maximum.
    """
    settings, refs = self.settings, self.refs
    plain = settings.logit_cap is None and refs.bias is None and refs.slopes is None
    if plain and settings.scale > 0.0:
      return product, settings.scale * tiles.LOG2_E, None
    slope = distance = None
    if refs.slopes is not None:
      slope, distance = refs.slopes[self.n], tiles.distance(*self.positions())
    bias = None if refs.bias is None else self.of(refs.bias)
    x, tanh = tiles.scores(
      product,
      scale=settings.scale,
      logit_cap=settings.logit_cap,
      bias=bias,
      slope=slope,
      distance=distance,
    )
    return x, 1.0, tanh

  def allowed(self) -> Array:
    """What the rule says of every pair."""
    parts = (self.refs.q_info, self.refs.k_info, self.refs.dense)
    q_info, k_info, dense = (tuple(map(self.of, operands)) for operands in parts)
    return self.settings.rule(*self.positions(), q_info, k_info, tuple(x != 0 for x in dense))

  def dropped(self, x: Array, *, rescale: bool = False) -> Array:
    """x with 0 where dropout takes it; the forward pass rescales what is left once, at its end."""
    if self.refs.seeds is None:
      return x
    rate, seed = self.settings.dropout_rate, self.refs.seeds[self.b, self.n]
    keep = tiles.keep(seed, *self.positions(), rate=rate)
    return jnp.where(keep, x * (1.0 / (1.0 - rate)) if rescale else x, 0.0)
