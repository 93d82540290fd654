"""The gradient of the bias of softmax attention on a TPU, where one is asked for.

    dBias = sum over what the bias broadcasts over of dS,   dS = p (dP - delta)

A bias is `#B #N #T #S`: what it lacks is summed here, tile by tile, so nothing larger than the bias
is ever stored. The grid runs over the bias's own rows, heads and blocks of `T S`, and last over all
that is summed into one of them, which therefore stays in vector memory until it is complete:

    per pair       (b n) (query block, key block), then the rows and heads it is shared by
    per query      (b n) (query block), then the key blocks and those
    per key        (b n) (key block), then the query blocks and those

It recomputes p and dP, two products of the five that the backward pass has; what that pass gives is
not touched, so who has no bias pays nothing. Blocks that the visits leave out add nothing and are
not computed. The order of the sums is that of the grid: two runs give the same bits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash_tpu_tiles, tiles
from pallas_kernels.flash import Extras, Settings, Visits
from pallas_kernels.flash_tpu_tiles import LANES, Operand, Place, Tile, dot

Array = jax.Array

_EMPTY, _MIXED, _FULL = 0, 1, 2


class _Call(NamedTuple):
  """What the kernel knows before it runs."""

  settings: Settings
  operands: dict[str, Operand]
  kind: str
  """That of the bias: `tile`, `q_row` or `k_row`."""
  block: tuple[int, int]
  part: tuple[int, int]
  own: tuple[int, int]
  """The rows and heads of the bias."""
  rows: tuple[int, int]
  """Those of q."""
  states: tuple[int, ...]
  """The shape of the states."""

  def place(self, b: Array, n: Array, x: Array, y: Array, r: Array, states_ref) -> Place:
    """Where a step is: r counts the rows and heads that share the bias."""
    del states_ref
    heads = jnp.int32(1 if self.own[1] > 1 else self.rows[1])
    b = b if self.own[0] > 1 else lax.div(r, heads)
    n = n if self.own[1] > 1 else lax.rem(r, heads)
    return Place(b, n, *((y, x) if self.kind == "k_row" else (x, y)))

  def state(self, place: Place, states_ref) -> Array:
    """Whether a block is empty, mixed or full."""
    B, N, queries, keys = self.states
    row = (place.b if B > 1 else 0) * N + (place.n if N > 1 else 0)
    return states_ref[(row * queries + place.i) * keys + place.j]


def gradient(
  q: Array,
  k: Array,
  v: Array,
  d_out: Array,
  base: Array,
  delta: Array,
  extras: Extras,
  settings: Settings,
  by_query: Visits,
  block: tuple[int, int],
) -> Array:
  """The gradient of `extras.bias`, in its shape, float32."""
  (B, T, N, _), (S, K, _) = q.shape, v.shape[1:]
  assert extras.bias is not None
  shape = extras.bias.shape
  operands = (
    flash_tpu_tiles.inputs(q, k, v, block)
    | flash_tpu_tiles.gradients(d_out, base, delta, block)
    | flash_tpu_tiles.modifiers(extras, T, S, block)
  )
  bias = operands["bias"]
  states = _states(by_query, flash_tpu_tiles.cdiv(S, block[1]))
  part = flash_tpu_tiles.parts(block)
  own = (shape[0], shape[1])
  call = _Call(settings, operands, bias.kind, block, part, own, (B, N), states.shape)
  queries, keys = states.shape[2:]
  shared = (1 if own[0] > 1 else B) * (1 if own[1] > 1 else N)
  outer = (keys, queries) if bias.kind == "k_row" else (queries, keys)
  output = Operand(bias.kind, jax.ShapeDtypeStruct(bias.array.shape, jnp.float32))
  own_place = lambda b, n, x, y, r, ref: call.place(b, n, x, y, r, ref)._replace(b=b, n=n)
  d_bias = pl.pallas_call(
    functools.partial(_kernel, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(*own, *outer, shared),
      in_specs=[x.spec(block, N // K, call.place) for x in operands.values()],
      out_specs=output.spec(block, 1, own_place),
      scratch_shapes=[pltpu.VMEM((block[0], LANES), jnp.float32)] if bias.kind == "q_row" else [],
    ),
    out_shape=output.array,
    compiler_params=flash_tpu_tiles.compiler_params(
      "parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"
    ),
    name="flash_bias_gradient",
  )(states.reshape(-1), *(x.array for x in operands.values()))
  if bias.kind == "tile":
    return d_bias[:, :, :T, :S]
  if bias.kind == "q_row":
    return d_bias[:, :, 0, :T, None]
  d_bias = d_bias[..., :S]
  return d_bias if shape[3] == S else d_bias.sum(-1, keepdims=True)


def _states(visits: Visits, keys: int) -> Array:
  """int32 `#B #N query_blocks key_blocks`: empty, mixed or full."""
  order, full, active = (jnp.asarray(x) for x in visits)
  nth = lax.broadcasted_iota(jnp.int32, order.shape, 3)
  kind = jnp.where(nth < full[..., None], _FULL, jnp.where(nth < active[..., None], _MIXED, _EMPTY))
  here = order[..., None] == lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, keys), 4)
  return jnp.where(here, kind[..., None], _EMPTY).max(3).astype(jnp.int32)


def _kernel(states_ref, *refs, call: _Call):
  """One step: what one block of scores of one row and head adds."""
  inputs, (out_ref, *scratch) = flash_tpu_tiles.named(call.operands, refs)
  b, n, x, y, r = (pl.program_id(axis) for axis in range(5))
  place = call.place(b, n, x, y, r, states_ref)
  state = call.state(place, states_ref)
  first = r == 0 if call.kind == "tile" else (y == 0) & (r == 0)
  total_ref = scratch[0] if scratch else out_ref

  @pl.when(first)
  def start():
    total_ref[...] = jnp.zeros_like(total_ref)

  for kind in (_FULL, _MIXED):

    @pl.when(state == kind)
    def visit(masked=kind == _MIXED):
      make = lambda first: Tile(
        call.settings, inputs, place, call.block, call.rows[1], first, call.part, False
      )
      products = functools.partial(_products, inputs)
      add = functools.partial(_add, inputs, total_ref, call.kind, masked)
      flash_tpu_tiles.walk(call.block, call.part, make, products, add)

  if scratch:

    @pl.when((y == pl.num_programs(3) - 1) & (r == pl.num_programs(4) - 1))
    def finish():
      total = jnp.broadcast_to(total_ref[...].sum(-1, keepdims=True), total_ref.shape)
      out_ref[...] = total.T[:1]


def _products(inputs, tile: Tile) -> tuple[Array, Array]:
  """(q . k, dO . v) of a part."""
  q, d_out = (inputs[name].array[tile.queries()] for name in ("q", "d_out"))
  k, v = (inputs[name].array[tile.keys()] for name in "kv")
  return dot(q, k, (1, 1)), dot(d_out, v, (1, 1))


def _add(inputs, total_ref, kind: str, masked: bool, tile: Tile, products) -> None:
  """Adds a part's dS to the total, summed over what the bias has one of."""
  product, dp = products
  score2, _ = tile.scores(product)
  p = jnp.exp2((tile.masked(score2) if masked else score2) - tile.of("base"))
  kept = tile.kept()
  if kept is not None:
    dp = flash_tpu_tiles.dropped(dp * (1.0 / (1.0 - tile.settings.dropout_rate)), kept)
  ds = tiles.d_scores(p, dp, tile.of("delta"))
  if kind == "tile":
    total_ref[tile.queries(), tile.keys()] += ds
  elif kind == "k_row":
    total_ref[:, tile.keys()] += ds.sum(0, keepdims=True)
  else:
    groups = (ds[:, at : at + LANES] for at in range(0, tile.size[1], LANES))
    total_ref[tile.queries()] += functools.reduce(jnp.add, groups)
