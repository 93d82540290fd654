"""Softmax attention on a TPU.

Forward: a grid of (batch row, query head, step), where the steps are the visits alone, written into
one list (`flash_tpu_tiles.Steps`), so what a mask leaves out costs neither a copy nor a step; the
pipeline copies the next step's blocks while one computes. A step is a block of 1024 queries by
1024 keys in four parts of 512 x 512, straight code:

    S = Q K^T                matrix unit; the next part's is asked for before this one's is used
    m, p = 2^(S - m), l      vector unit; full blocks without a mask, mixed ones with the rule's
    acc = acc alpha + p V    matrix unit

m is kept `queries 128`, all lanes alike; l in 128 partial sums, one per lane, so that only the
maximum crosses lanes. A row of the output is written once, after its last step, with m and l turned
from columns into rows. Query heads that share a key head read it through the index of its block.

The floor is the matrix unit: 4 x 1024 x 1024 x 128 flops are 4096 cycles of a TPU v5e at its
published rate; a v6e or TPU7x, whose arrays are 256 wide, could do them in 1024 but needs 2048 with
heads of 128. The compiler's schedule of a full step is 4010 cycles on a v5e, 2545 on a v6e, 2581 on
a TPU7x, of a mixed causal one 4283, 3066 and 3043, stalls not counted. Memory: 512 KiB of keys and
values a step, a quarter of what a v5e's memory brings in that time.

Backward: `flash_tpu_backward`, and `flash_tpu_bias` where a bias wants its gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash, flash_tpu_backward, flash_tpu_bias, flash_tpu_tiles, tiles
from pallas_kernels.flash import Blocks, Extras, Settings, Visits
from pallas_kernels.flash_tpu_tiles import (
  LANES,
  MAX_BLOCKS,
  MAX_GROUPS,
  MAX_SCALARS,
  MAX_STEPS,
  Operand,
  Place,
  Steps,
  Tile,
  across,
  cdiv,
  dot,
)

Array = jax.Array

PRIMITIVES = flash.PRIMITIVES | {"ceil", "floor", "is_finite", "not", "population_count", "pow"}

_SIDES = (128, 256, 384, 512, 768, 1024)
"""Sides of a block that divide into large parts."""

_LARGEST = 4096
"""The largest side of a block, where a text is so long that smaller ones would be too many, ..."""

_MEMORY = 32 * 2**20
"""... and the bytes of vector memory that the operands and sums of its backward pass may take: what
registers spill takes the rest.
"""


def unsupported(q: Array, k: Array, v: Array, extras: Extras, settings: Settings) -> str | None:
  """Why this cannot be computed here, or None."""
  (B, T, N, H), (S, K, h) = q.shape, v.shape[1:]
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    return f"{q.dtype} is neither float32 nor bfloat16"
  if max(H, h) > 512:
    return f"head_dim {max(H, h)} is more than 512"
  own = any(x.shape[1] > 1 for x in extras.dense)
  if N // K > MAX_GROUPS and own:
    return f"{N // K} heads per key head, each with a mask of its own, are more than {MAX_GROUPS}"
  lists = (*extras.q_info, *extras.k_info, *extras.dense)
  rows = (B if any(x.shape[0] > 1 for x in lists) else 1) * (N if own else 1)
  passes = blocks(q.shape, k.shape, v.shape, q.dtype, settings)
  seeds = 0 if extras.dropout_seeds is None else B * N
  for name, block in zip(passes._fields, passes, strict=True):
    visits, most = rows * _count(T, S, block), MAX_STEPS
    if name == "d_query" and extras.bias is None:
      continue
    if visits > most:
      return f"{visits} blocks of scores ({rows} masks, T={T}, S={S}) are more than {most}"
    if visits + seeds > MAX_SCALARS:
      return f"{visits} blocks of scores and {seeds} seeds of dropout are more than {MAX_SCALARS}"
  return None


def blocks(q_shape, k_shape, v_shape, dtype, settings: Settings) -> Blocks:
  """In which blocks the visits of each pass are counted."""
  del settings
  T, S, width = q_shape[1], k_shape[1], max(q_shape[3], v_shape[3])
  return Blocks(*(_longer(T, S, most, width, dtype) for most in _most(width, dtype)))


def _most(width: int, dtype) -> tuple[tuple[int, int], ...]:
  """The usual largest blocks of each pass: they fit the vector memory of every chip."""
  large = 1024 if width <= 256 and dtype != jnp.float32 else 512
  keys = 512 if width > 192 and _small_units() else large
  return (large, large), (512, 512), (keys, keys)


def _small_units() -> bool:
  """Whether the matrix units are 128 x 128, as until TPU v5: they alone bound the backward pass of
  wide heads, and small blocks multiply less above the diagonal.
  """
  return pltpu.is_tpu_device() and pltpu.get_tpu_info().mxu_column_size == 128


def _longer(T: int, S: int, most: tuple[int, int], width: int, dtype) -> tuple[int, int]:
  """Blocks of at most `most`, or twice that and more where there would be too many of them and the
  vector memory has room.
  """
  block = _side(T, most[0]), _side(S, most[1])
  while _count(T, S, block) > MAX_STEPS:
    block_q, block_k = block
    taller = block_q < _LARGEST and cdiv(T, block_q) >= cdiv(S, block_k)
    longer = (2 * block_q, block_k) if taller or block_k == _LARGEST else (block_q, 2 * block_k)
    if max(longer) > _LARGEST or _memory(longer, width, dtype) > _MEMORY:
      break
    block = longer
  return block


def _memory(block: tuple[int, int], width: int, dtype) -> int:
  """Bytes of vector memory that the backward pass takes for a block: q, dO, k, v, dk and dv twice,
  because one is copied while the other is used, and float32 sums, three of a block of dq.
  """
  size = jnp.dtype(dtype).itemsize
  of_query, of_key = 2 * 2 * size + 3 * 4, 2 * 4 * size + 2 * 4
  padded = cdiv(width, LANES // 2) * (LANES // 2)
  return padded * (of_query * block[0] + of_key * block[1])


def _count(T: int, S: int, block: tuple[int, int]) -> int:
  """The blocks of T x S scores; more than any list has room for where one axis has too many."""
  queries, keys = cdiv(T, block[0]), cdiv(S, block[1])
  return queries * keys if max(queries, keys) <= MAX_BLOCKS else MAX_STEPS + queries * keys


def _side(length: int, most: int) -> int:
  """The side that cuts a length into as few blocks as `most` does, and wastes least of the last."""
  return next(side for side in _SIDES if side >= cdiv(length, cdiv(length, most)))


class _Call(NamedTuple):
  """What the kernel knows before it runs."""

  settings: Settings
  operands: dict[str, Operand]
  steps: Steps
  block: tuple[int, int]
  part: tuple[int, int]
  heads: int

  def place(self, b: Array, n: Array, s: Array, words_ref) -> Place:
    """Where step s is."""
    word = self.steps.word(words_ref, b, n, s)
    return Place(b, n, flash_tpu_tiles.field(word, "row"), flash_tpu_tiles.field(word, "other"))


def forward(
  q: Array, k: Array, v: Array, extras: Extras, settings: Settings, by_query: Visits
) -> tuple[Array, Array, Array]:
  """(out `B T N h`, m and l `B N T`, float32)."""
  (B, T, N, _), (S, K, h) = q.shape, v.shape[1:]
  block = blocks(q.shape, k.shape, v.shape, q.dtype, settings).forward
  operands = flash_tpu_tiles.inputs(q, k, v, block) | flash_tpu_tiles.modifiers(extras, T, S, block)
  steps = flash_tpu_tiles.steps(by_query)
  part = flash_tpu_tiles.parts(block)
  call = _Call(settings, operands, steps, block, part, N)
  specs = [x.spec(block, N // K, call.place) for x in operands.values()]
  length, width = operands["q"].array.shape[2], operands["v"].array.shape[3]
  outputs = (
    Operand("query", jax.ShapeDtypeStruct((B, N, length, width), v.dtype)),
    Operand("q_row", jax.ShapeDtypeStruct((B, N, 2, length), jnp.float32)),
  )
  column = pltpu.VMEM((block[0], LANES), jnp.float32)
  out, rows = pl.pallas_call(
    functools.partial(_kernel, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, N, steps.length),
      in_specs=specs,
      out_specs=[x.spec(block, 1, call.place) for x in outputs],
      scratch_shapes=[column, column, pltpu.VMEM((block[0], width), jnp.float32)],
    ),
    out_shape=[x.array for x in outputs],
    compiler_params=flash_tpu_tiles.compiler_params("parallel", "parallel", "arbitrary"),
    name="flash_forward",
  )(steps.words, *(x.array for x in operands.values()))
  return out[:, :, :T, :h].swapaxes(1, 2), rows[:, :, 0, :T], rows[:, :, 1, :T]


def _kernel(words_ref, *refs, call: _Call):
  """One step: a block of scores, and what comes before the first and after the last of a row."""
  inputs, rest = flash_tpu_tiles.named(call.operands, refs)
  out_ref, rows_ref, m_ref, l_ref, acc_ref = rest
  b, n, s = (pl.program_id(axis) for axis in range(3))
  word, place = call.steps.word(words_ref, b, n, s), call.place(b, n, s, words_ref)

  @pl.when(flash_tpu_tiles.flag(word, "first"))
  def start():
    m, l = -jnp.inf, 0.0
    if "sinks" in inputs:
      m, l = inputs["sinks"].array[place.n] * tiles.LOG2_E, 1.0 / LANES
    m_ref[...] = jnp.full_like(m_ref, m)
    l_ref[...] = jnp.full_like(l_ref, l)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  for kind in ("full", "mixed"):

    @pl.when(flash_tpu_tiles.flag(word, kind))
    def visit(masked=kind == "mixed"):
      make = lambda first: Tile(
        call.settings, inputs, place, call.block, call.heads, first, call.part, False
      )
      products = functools.partial(_products, inputs)
      online = functools.partial(_online, inputs, (m_ref, l_ref, acc_ref), masked)
      flash_tpu_tiles.walk(call.block, call.part, make, products, online)

  @pl.when(flash_tpu_tiles.flag(word, "last"))
  def finish():
    l = l_ref[...].sum(-1, keepdims=True)
    # The greatest score adds 1 to l, so only a row that has seen nothing, whose sum is 0, has less.
    share = 1.0 / (jnp.maximum(l, 0.5) * (1.0 - call.settings.dropout_rate))
    out_ref[...] = (acc_ref[...] * share).astype(out_ref.dtype)
    m_and_l = m_ref[...], jnp.broadcast_to(l, l_ref.shape)
    rows_ref[...] = jnp.concatenate([flash_tpu_tiles.row(x) for x in m_and_l])


def _products(inputs, tile: Tile) -> Array:
  """q . k of a part."""
  q_ref, k_ref = inputs["q"].array, inputs["k"].array
  return dot(q_ref[tile.queries()], k_ref[tile.keys()], (1, 1))


def _online(inputs, state, masked: bool, tile: Tile, product: Array) -> None:
  """Takes a part into the running softmax of its queries.

  l is summed over groups of 128 keys only, one sum per lane; its lanes are added up at the end.
  """
  m_ref, l_ref, acc_ref = state
  rows, v = tile.queries(), inputs["v"].array[tile.keys()]
  score2, _ = tile.scores(product)
  if masked:
    score2 = tile.masked(score2)
  before = m_ref[rows]
  m = jnp.maximum(before, score2.max(-1, keepdims=True))
  m_ref[rows] = m
  m = tiles.finite(m) if masked or "bias" in inputs else m
  p = jnp.exp2(score2 - across(m, tile.size[1]))
  alpha = jnp.exp2(before - m)
  groups = (p[:, at : at + LANES] for at in range(0, tile.size[1], LANES))
  l_ref[rows] = l_ref[rows] * alpha + functools.reduce(jnp.add, groups)
  acc = acc_ref[rows] * across(alpha, v.shape[1])
  acc_ref[rows] = acc + dot(flash_tpu_tiles.dropped(p, tile.kept()).astype(v.dtype), v, (1, 0))


def backward(
  q: Array,
  k: Array,
  v: Array,
  d_out: Array,
  base: Array,
  delta: Array,
  extras: Extras,
  settings: Settings,
  by_query: Visits,
  by_key: Visits,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
  """(dq, dk, dv, d_bias, d_slopes); `d_out`, `base` and `delta` as in `flash.Rows`."""
  _, d_query, d_key = blocks(q.shape, k.shape, v.shape, q.dtype, settings)
  arguments = (q, k, v, d_out, base, delta, extras, settings)
  dq, dk, dv, d_slopes = flash_tpu_backward.gradients(*arguments, by_key, d_key)
  d_bias = None
  if extras.bias is not None:
    d_bias = flash_tpu_bias.gradient(*arguments, by_query, d_query)
  return dq, dk, dv, d_bias, d_slopes
