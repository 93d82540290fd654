"""Softmax attention on a TPU: the backward pass, all three gradients in one walk over the keys.

A grid of (batch row, key head, step, query head of the key head): a step is a block of scores, 1024
queries by 1024 keys, in parts of 512 queries or 256. Parts are held keys first, `k q`, so that
base and delta are rows and four of the five products read their operands as they lie:

    S^T = K Q^T     P^T = 2^(S^T - base)    dP^T = V dO^T     dS^T = P^T (dP^T - delta)
    dV += P^T dO    dK += dS^T Q            dQ += (dS^T)^T K

dK and dV stay in vector memory over all queries and all query heads of a key head, in a fixed
order, and are written once. dQ comes in parts, one per key block, and lies in HBM, float32: a step
asks for what is there before it computes, adds its own, and sends it back while the next step
computes. Two steps in a row for the same queries add to what is still at hand; a copy that reads
never overlaps one that writes the same rows, because a step waits for the last one's before it
sends its own. Nothing grows with T x S, and no order of sums depends on time.

Those four stream a part's keys past squares of queries that the matrix unit holds, so a part has
all keys of its block: with 512 of them twice as many squares would be loaded.

Two passes, one for dQ and one for dK and dV, would need no traffic of dQ but seven products instead
of five and every exponential twice. The traffic, 512 KiB there and as much back a step, is a fifth
of what a v5e's or a v6e's memory moves in the time of the floor.

The floor is the matrix unit: 10 x 1024 x 1024 x 128 flops are 10240 cycles of a v5e at its
published rate; a v6e or TPU7x could do them in 2560 but needs 5120 with heads of 128. The
compiler's schedule of a full step is 4430 bundles on a TPU7x, which is below that: no bundle counts
what it waits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash_tpu_tiles, tiles
from pallas_kernels.flash import Extras, Settings, Visits
from pallas_kernels.flash_tpu_tiles import LANES, Operand, Place, Steps, Tile, dot

Array = jax.Array

_KEYS = 1024
"""The most keys of a part."""


class _Call(NamedTuple):
  """What the kernel knows before it runs."""

  settings: Settings
  operands: dict[str, Operand]
  steps: Steps
  block: tuple[int, int]
  part: tuple[int, int]
  heads: int
  group: int

  def place(self, b: Array, head: Array, s: Array, g: Array, words_ref) -> Place:
    """Where step s is for query g of a key head; lists of each head count g themselves."""
    word = self.steps.word(words_ref, b, head, s)
    g = g + flash_tpu_tiles.field(word, "group")
    i, j = flash_tpu_tiles.field(word, "other"), flash_tpu_tiles.field(word, "row")
    return Place(b, head * self.group + g, i, j)

  def outputs(self, extras: Extras) -> list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
    """dq, whole in HBM; dk and dv, a block of keys at a time; with slopes, sums for theirs."""
    q, k, v = (self.operands[name].array for name in "qkv")
    found = [(jax.ShapeDtypeStruct(q.shape, jnp.float32), pl.BlockSpec(memory_space=pltpu.HBM))]
    index = lambda b, head, s, g, words_ref: (b, head, self.place(b, head, s, g, words_ref).j, 0)
    for x in (k, v):
      spec = pl.BlockSpec((None, None, self.block[1], x.shape[3]), index)
      found.append((jax.ShapeDtypeStruct(x.shape, x.dtype), spec))
    if extras.alibi_slopes is not None:
      sums = (self.group, 8, LANES)
      spec = pl.BlockSpec((None, None, *sums), lambda b, head, *_: (b, head, 0, 0, 0))
      found.append((jax.ShapeDtypeStruct((*k.shape[:2], *sums), jnp.float32), spec))
    return found

  def scratch(self) -> "_Scratch":
    """What the kernel holds."""
    (block_q, block_k), (q, k, v) = self.block, (self.operands[name].array for name in "qkv")
    vmem = lambda rows, x: pltpu.VMEM((rows, x.shape[3]), jnp.float32)
    dq = vmem(block_q, q)
    copies, sent = pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((2,), jnp.int32)
    return _Scratch(vmem(block_k, k), vmem(block_k, v), dq, dq, dq, copies, sent)


class _Scratch(NamedTuple):
  """What lives in vector memory from step to step."""

  dk: Any
  dv: Any
  dq: Any
  """This step's part of dq."""
  incoming: Any
  """dq of this step's queries as it was."""
  outgoing: Any
  """dq of the last step's queries, on its way to HBM."""
  semaphores: Any
  sent: Any
  """SMEM: the query head and query block of `outgoing`, or -1 where nothing is on its way."""


def gradients(
  q: Array,
  k: Array,
  v: Array,
  d_out: Array,
  base: Array,
  delta: Array,
  extras: Extras,
  settings: Settings,
  by_key: Visits,
  block: tuple[int, int],
) -> tuple[Array, Array, Array, Array | None]:
  """(dq, dk, dv, d_slopes)."""
  (B, T, N, H), (S, K, h) = q.shape, v.shape[1:]
  group = N // K
  operands = (
    flash_tpu_tiles.inputs(q, k, v, block)
    | flash_tpu_tiles.gradients(d_out, base, delta, block)
    | flash_tpu_tiles.modifiers(extras, T, S, block)
  )
  shared = by_key.order.shape[1] == 1
  steps = flash_tpu_tiles.steps(by_key, 1 if shared else group)
  part = flash_tpu_tiles.parts(block, (_queries(), _KEYS))
  call = _Call(settings, operands, steps, block, part, N, group)
  outputs = call.outputs(extras)
  zeros = jnp.zeros(outputs[0][0].shape, jnp.float32)
  dq, dk, dv, *d_slopes = pl.pallas_call(
    functools.partial(_kernel, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, K, steps.length, group if shared else 1),
      in_specs=[*(x.spec(block, group, call.place) for x in operands.values()), outputs[0][1]],
      out_specs=[spec for _, spec in outputs],
      scratch_shapes=call.scratch(),
    ),
    out_shape=[shape for shape, _ in outputs],
    input_output_aliases={1 + len(operands): 0},
    compiler_params=flash_tpu_tiles.compiler_params(
      "parallel", "parallel", "arbitrary", "arbitrary"
    ),
    name="flash_backward",
  )(steps.words, *(x.array for x in operands.values()), zeros)
  dq = (dq[:, :, :T, :H] * settings.scale).astype(q.dtype).swapaxes(1, 2)
  dk, dv = dk[:, :, :S, :H].swapaxes(1, 2), dv[:, :, :S, :h].swapaxes(1, 2)
  return dq, dk, dv, d_slopes[0].sum((0, 3, 4)).reshape(N) if d_slopes else None


def _queries() -> int:
  """The most queries of a part: by the compilers' schedules 256 are 2 % fewer bundles on a v6e, and
  7 and 10 % more on a v5e and a TPU7x.
  """
  return 256 if pltpu.is_tpu_device() and pltpu.get_tpu_info().generation == 6 else 512


def _kernel(words_ref, *refs, call: _Call):
  """One step: a block of scores, keys first."""
  inputs, (_, dq_hbm, dk_ref, dv_ref, *rest) = flash_tpu_tiles.named(call.operands, refs)
  d_slopes_ref = rest.pop(0) if "slopes" in inputs else None
  scratch = _Scratch(*rest)
  b, head, s, g = (pl.program_id(axis) for axis in range(4))
  word, place = call.steps.word(words_ref, b, head, s), call.place(b, head, s, g, words_ref)
  is_ = functools.partial(flash_tpu_tiles.flag, word)
  last_group = g == pl.num_programs(3) - 1
  last_step = (s == pl.num_programs(2) - 1) & last_group

  @pl.when((s == 0) & (g == 0))
  def nothing_sent():
    scratch.sent[0] = jnp.int32(-1)
    scratch.sent[1] = jnp.int32(-1)
    if d_slopes_ref is not None:
      d_slopes_ref[...] = jnp.zeros_like(d_slopes_ref)

  @pl.when(is_("first") & (g == 0))
  def start():
    scratch.dk[...] = jnp.zeros_like(scratch.dk)
    scratch.dv[...] = jnp.zeros_like(scratch.dv)

  transfer = _Transfer(call, scratch, dq_hbm, place)

  @pl.when(is_("full") | is_("mixed"))
  def read():
    transfer.start()
    if max(call.block) > flash_tpu_tiles.UNROLLED:
      scratch.dq[...] = jnp.zeros_like(scratch.dq)

  for kind in ("full", "mixed"):

    @pl.when(is_(kind))
    def visit(masked=kind == "mixed"):
      make = lambda first: Tile(
        call.settings, inputs, place, call.block, call.heads, first, call.part, True
      )
      d_slope = None if d_slopes_ref is None else d_slopes_ref.at[place.n - head * call.group]
      products = functools.partial(_products, inputs)
      accumulate = functools.partial(_accumulate, inputs, scratch, d_slope, masked)
      flash_tpu_tiles.walk(call.block, call.part, make, products, accumulate, ahead=False)

  @pl.when(is_("full") | is_("mixed"))
  def write():
    transfer.finish()

  @pl.when(is_("last") & last_group)
  def finish():
    kept = 1.0 - call.settings.dropout_rate
    dk_ref[...] = (scratch.dk[...] * call.settings.scale).astype(dk_ref.dtype)
    dv_ref[...] = (scratch.dv[...] * (1.0 / kept)).astype(dv_ref.dtype)

  @pl.when(last_step)
  def drain():
    transfer.drain()


class _Transfer:
  """Adds a step's dq to what lies in HBM: read while the step computes, written while the next one
  does. The same queries twice in a row are still at hand.
  """

  def __init__(self, call: _Call, scratch: _Scratch, dq_hbm, place: Place):
    self.scratch, self.place = scratch, place
    rows = pl.ds(pl.multiple_of(place.i * call.block[0], call.block[0]), call.block[0])
    self.tile = dq_hbm.at[place.b, place.n, rows]
    self.again = (scratch.sent[0] == place.n) & (scratch.sent[1] == place.i)

  def incoming(self):
    """The copy that reads."""
    return pltpu.make_async_copy(self.tile, self.scratch.incoming, self.scratch.semaphores.at[0])

  def outgoing(self):
    """The copy that writes; its place matters only where it starts."""
    return pltpu.make_async_copy(self.scratch.outgoing, self.tile, self.scratch.semaphores.at[1])

  def start(self):
    """Before the step computes."""

    @pl.when(jnp.logical_not(self.again))
    def read():
      self.incoming().start()

  def finish(self):
    """After it has."""
    self.drain()
    outgoing, dq = self.scratch.outgoing, self.scratch.dq

    @pl.when(self.again)
    def same():
      outgoing[...] = outgoing[...] + dq[...]

    @pl.when(jnp.logical_not(self.again))
    def other():
      self.incoming().wait()
      outgoing[...] = self.scratch.incoming[...] + dq[...]

    self.outgoing().start()
    self.scratch.sent[0] = self.place.n
    self.scratch.sent[1] = self.place.i

  def drain(self):
    """Waits for what is on its way."""

    @pl.when(self.scratch.sent[0] >= 0)
    def wait():
      self.outgoing().wait()


def _products(inputs, tile: Tile) -> tuple[Array, Array]:
  """(k . q, v . dO) of a part."""
  k, v = (inputs[name].array[tile.keys()] for name in "kv")
  q, d_out = (inputs[name].array[tile.queries()] for name in ("q", "d_out"))
  return dot(k, q, (1, 1)), dot(v, d_out, (1, 1))


def _accumulate(inputs, scratch: _Scratch, d_slope, masked: bool, tile: Tile, products) -> None:
  """A part's share of every gradient."""
  product, dp = products
  settings, rows, keys = tile.settings, tile.queries(), tile.keys()
  q, k, d_out = inputs["q"].array[rows], inputs["k"].array[keys], inputs["d_out"].array[rows]
  score2, tanh = tile.scores(product)
  if masked:
    score2 = tile.masked(score2)
  p = jnp.exp2(score2 - inputs["base"].array[:, rows])
  kept = tile.kept()
  scratch.dv[keys] += dot(flash_tpu_tiles.dropped(p, kept).astype(k.dtype), d_out, (1, 0))
  if kept is not None:
    dp = flash_tpu_tiles.dropped(dp * (1.0 / (1.0 - settings.dropout_rate)), kept)
  ds = tiles.d_scores(p, dp, inputs["delta"].array[:, rows])
  if d_slope is not None:
    far = ds * tiles.distance(*tile.positions())
    far = far.reshape(-1, 8, tile.size[0]).sum(0)
    d_slope[...] -= sum(far[:, at : at + LANES] for at in range(0, tile.size[0], LANES))
  dx = ds if tanh is None else tiles.d_product(ds, tanh, scale=1.0)
  dx = dx.astype(k.dtype)
  scratch.dk[keys] += dot(dx, q, (1, 0))
  dq = dot(dx, k, (0, 0))
  is_first = isinstance(tile.first[1], int) and tile.first[1] == 0
  scratch.dq[rows] = dq if is_first else scratch.dq[rows] + dq
