"""The gradients of a chunk from the state that enters it and the gradient of the one that leaves,
on Hopper GPUs (sm_90a). Chunks do not depend on each other here.

    dX = scale dO, row by row            dP = (dX V^T + dw) E
    dQ = read (dX S^T + dw z^T) + dP K   dK = write (V dS^T + dz^T) + dP^T Q
    dV = P^T dX + write (K dS)

and of the log decays, float32, per token:

    row_i = sum_j<i dP_ij (Q K^T)_ij     how much the decays before a read matter, inside the chunk
    column_j = sum_i>j the same          after a write, inside the chunk
    read_i, write_j                      the same of what enters and of what leaves
    fade_m = sum_h S_mh dS_mh            of the whole chunk, per channel (times exp(g) outside)

One block of threads takes a run of chunks of one head: a feeder, a warpgroup whose rows are
queries (dQ, `row`, `read`, `fade`) and one whose rows are keys (dK, dV, `column`, `write`). q and k
of a chunk come by one ring, 64 columns of v, dO, S and dS by another. Sums over h are accumulators
(scales are applied to them, not to dO); dV leaves slice by slice.

With decays per channel q and k come faded, P comes ready, and dP leaves for
`linear_hopper_channel`, as do the gradients of the faded q and k.

float32 comes and is multiplied as three bfloat16, 32 columns at a time; results are float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, hopper_parts
from pallas_kernels.hopper import COLUMN, ROW, ROWS, Plan, Ring, along, matrix, row_of, zeros
from pallas_kernels.hopper_parts import Parts
from pallas_kernels.linear_hopper_walk import (
  COLUMNS,
  EXTRA,
  READ,
  SCALE,
  WRITE,
  columns,
  decay,
  head,
)
from pallas_kernels.linear_tiles import CHUNK, Array

SPAN = 8
"""Chunks of a run."""


class Static(NamedTuple):
  """What the kernel knows before anything runs."""

  plan: Plan
  chunks: int
  heads: int
  slices: int
  on_chip: bool


class Inputs(NamedTuple):
  """What it reads."""

  q: Parts
  k: Parts
  v: Parts
  d_out: Parts
  states: Parts
  d_states: Parts
  """`B N C M h`: of the state that enters, of the gradient of the one that leaves."""
  numbers: Any
  pairs: Parts | None
  z: Any
  d_z: Any
  """`B N C M`, or None unless normalized."""


class Outputs(NamedTuple):
  """What it writes; the last two with decays per channel only."""

  dq: Any
  dk: Any
  dv: Any
  sums: Any
  """`B N C 4 CHUNK`: row, read, column, write."""
  fade: Any
  """`B N C M`."""
  d_pairs: Any
  d_pairs_t: Any
  """`B N C CHUNK CHUNK`: dP below and on the diagonal, dP^T above it."""


class Scratch(NamedTuple):
  """What lies in shared memory."""

  tokens: Ring
  slices: Ring
  out_smem: Any
  """A tile of each computing warpgroup."""
  positions_smem: Any
  pairs_smem: Parts | None
  """P^T, or None: it came."""


class _Chunks:
  """A run of chunks of one head."""

  def __init__(self, static: Static, inputs: Inputs, counts, outputs: Outputs, scratch: Scratch):
    self.static, self.inputs, self.outputs, self.scratch = static, inputs, outputs, scratch
    self.counts = counts  # the chunks of every run, then the slices, to compute
    self.b, self.n, run, self.wg = (
      lax.axis_index(name) for name in ("batch", "head", "run", "warpgroup")
    )
    self.first, self.parts, self.width = run * SPAN, len(inputs.k), columns(len(inputs.k))
    self.count = jnp.minimum(static.chunks - self.first, SPAN)  # to feed

  def feed(self) -> None:
    """The memory warpgroup: chunk after chunk, and slice after slice of each."""
    inputs, scratch, static = self.inputs, self.scratch, self.static

    def chunk(t, _):
      c = self.first + t
      here, rows = (self.b, self.n, c), pl.ds(c * CHUNK, CHUNK)
      of = lambda x: (self.b, rows, head(x, self.n, static.heads))
      at = hopper_parts.at
      tokens = [*at(inputs.q, *of(inputs.q[0])), *at(inputs.k, *of(inputs.k[0]))]
      tokens += [inputs.numbers.at[here], *at(inputs.pairs or (), *here)]
      scratch.tokens.fill(t, *tokens)

      def part(j, _):
        some = pl.ds(j * self.width, self.width)
        scratch.slices.fill(
          t * static.slices + j,
          *at(inputs.v, *of(inputs.v[0]), some),
          *at(inputs.d_out, *of(inputs.d_out[0]), some),
          *at(inputs.states, *here, slice(None), some),
          *at(inputs.d_states, *here, slice(None), some),
        )

      lax.fori_loop(0, static.slices, part, None)

    lax.fori_loop(0, self.count, chunk, None)
    scratch.tokens.drain(self.count)
    scratch.slices.drain(self.count * static.slices)

  def compute(self) -> None:
    """One of the two that compute."""
    for wg, chunk in enumerate((self.queries, self.keys)):

      @pl.when(self.wg == wg)
      def _(wg=wg, chunk=chunk):
        hopper.write_positions(self.scratch.positions_smem.at[wg])
        lax.fori_loop(0, self.counts[lax.axis_index("run")], lambda t, _: chunk(t), None)
        plgpu.wait_smem_to_gmem(0)

  def slice_count(self) -> Any:
    """How many there are, from memory if one: of a loop with one turn compilers make none, and what
    comes before it, in it and after it needs its registers at the same time.
    """
    many = self.static.slices
    return self.counts[self.counts.shape[0] - 1] if many == 1 else many

  def tokens(self, t) -> tuple[Parts, Parts, Any, Parts]:
    """(q, k, numbers, P if it comes) of a chunk, when they are here."""
    self.scratch.tokens.take(t)
    return self.tokens_again(t, 0)

  def tokens_again(self, t, uses: int) -> tuple[Parts, Parts, Any, Parts]:
    """The same, sharing no descriptor with what had fewer uses before."""
    many, ring, step = self.parts, self.scratch.tokens, t + uses
    q, k = (
      hopper_parts.Fresh(x, ring.slot(t), step)
      for x in (ring.buffers[:many], ring.buffers[many : 2 * many])
    )
    numbers, *pairs = hopper_parts.at(
      ring.buffers[2 * many :], hopper.unhoisted(ring.slot(t), step)
    )
    return q, k, numbers, pairs

  def slices(self, step) -> tuple[Parts, ...]:
    """(v, dO, S, dS) of a step, when they are here."""
    many, taken = self.parts, self.scratch.slices.take(step)
    return tuple(taken[i * many : (i + 1) * many] for i in range(4))

  def store(self, x: Array, gmem, wg: int, step) -> None:
    """A tile goes out, some columns at a time, each when the one before has left."""
    smem = self.scratch.out_smem.at[hopper.unhoisted(jnp.int32(wg), step)]
    width = self.width
    for first in range(0, x.shape[1], width):
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      smem[...] = x[:, first : first + width].astype(smem.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(smem, gmem.at[:, pl.ds(first, width)])

  def positions(self, wg: int, t):
    """Those of a computing warpgroup."""
    return self.scratch.positions_smem.at[hopper.unhoisted(jnp.int32(wg), t)]

  def put(self, c, i: int, x: Array) -> None:
    """A row of the sums."""
    self.outputs.sums.at[self.b, self.n, c, i][...] = x

  def dot(self, x_smem, x: Array) -> Array:
    """The sums along the rows of a tile in shared memory times one in registers."""
    total = row_of(0.0)
    for first in range(0, x.shape[1], COLUMNS):
      if first and self.parts > 1:
        plgpu.commit_smem()  # or all of them are loaded before the first is summed
      part = hopper_parts.load(hopper_parts.at(x_smem, slice(None), pl.ds(first, COLUMNS)))
      total = total + (part * x[:, first : first + COLUMNS]).sum(axis=1)
    return total

  def faded(self, sums: tuple[Array, ...], state_smem: Parts, d_state_smem: Parts):
    """The sums along the rows of S times dS, with one more slice of the columns."""
    load = lambda smem, i: hopper_parts.load(hopper_parts.at(smem, pl.ds(i * ROWS, ROWS)))
    new = []
    for i, total in enumerate(sums):
      new.append(total + (load(state_smem, i) * load(d_state_smem, i)).sum(axis=1))
      plgpu.commit_smem()  # the next loads and the next copy into this entry come after these loads
    return tuple(new)

  def queries(self, t) -> None:
    """dQ and what is summed along the rows of dP."""
    positions_smem = self.positions(0, t)
    inputs, scratch, static, on_chip = self.inputs, self.scratch, self.static, self.static.on_chip
    c, (q_smem, k_smem, numbers_smem, pairs) = self.first + t, self.tokens(t)
    here, M = (self.b, self.n, c), q_smem[0].shape[1]
    row = lambda i: plgpu.load(numbers_smem.at[i], layout=ROW)
    dq, dp = zeros(ROWS, M), zeros(CHUNK, CHUNK)
    fade = tuple(row_of(0.0) for _ in range(M // ROWS))

    def part(j, carry):
      dq, dp, fade = carry
      step = t * static.slices + j
      v_smem, d_smem, state_smem, d_state_smem = self.slices(step)
      dq = hopper_parts.product(d_smem, state_smem, dq, on_chip=on_chip)
      dp = hopper_parts.product(d_smem, v_smem, dp, on_chip=on_chip)
      fade = self.faded(fade, state_smem, d_state_smem)
      scratch.slices.give(step)
      return dq, dp, fade

    dq, dp, fade = lax.fori_loop(0, self.slice_count(), part, (dq, dp, fade))
    for i, x in enumerate(fade):
      self.outputs.fade.at[(*here, pl.ds(i * ROWS, ROWS))][...] = x
    dq, dp = (x * along(row(SCALE), 0, x.shape) for x in (dq, dp))
    if inputs.z is not None:
      z = plgpu.load(inputs.z.at[here], layout=COLUMN, optimized=False)
      dq = dq + along(row(EXTRA), 0, dq.shape) * along(z, 1, dq.shape)
      dp = dp + along(row(EXTRA), 0, dp.shape)
    rows = pl.ds(c * CHUNK, CHUNK)
    dq_gmem = self.outputs.dq.at[self.b, rows, self.n]
    i, j = hopper.positions(positions_smem)
    if pairs:
      plgpu.commit_smem()
      scratch.tokens.give(t)
      self.store(dq, dq_gmem, 0, t)
      self.store(jnp.where(j <= i, dp, 0.0), self.outputs.d_pairs.at[here], 0, t)
      return
    dq = dq * along(row(READ), 0, dq.shape)
    self.put(c, 1, self.dot(q_smem, dq))
    dp = dp * decay(numbers_smem, positions_smem, keys_first=False)
    scores = hopper_parts.product(q_smem, k_smem, on_chip=on_chip)
    self.put(c, 0, jnp.where(j < i, scores * dp, 0.0).sum(axis=1))
    dq = hopper_parts.add(dq, dp, k_smem, on_chip=on_chip)
    scratch.tokens.give(t)
    self.store(dq, dq_gmem, 0, t)

  def values(self, t, rows, write, given: bool, j, carry):
    """(dK, dP^T) with the terms of one more slice of the values, whose dV goes out."""
    scratch, static, on_chip = self.scratch, self.static, self.static.on_chip
    dk, dp = carry
    step = t * static.slices + j
    # 128 uses later than `tokens`, 64 than `tokens_again`: none of their descriptors is shared.
    still = lambda buffers, slot: hopper_parts.at(buffers, hopper.unhoisted(slot, step + 128))
    k_buffer = scratch.tokens.buffers[self.parts : 2 * self.parts]
    slot = scratch.tokens.slot(t)
    v_smem, d_smem, _, d_state_smem = self.slices(step)
    dk = hopper_parts.product(v_smem, d_state_smem, dk, on_chip=on_chip)
    dp = hopper_parts.product(v_smem, d_smem, dp, on_chip=on_chip)
    dv = hopper_parts.multiply(still(k_buffer, slot), d_state_smem, on_chip=on_chip)
    if given:
      pairs_smem = still(scratch.tokens.buffers[2 * self.parts + 1 :], slot)
    else:
      dv, pairs_smem = dv * write(dv.shape), still(scratch.pairs_smem, jnp.int32(0))
    dv = hopper_parts.multiply(pairs_smem, d_smem, dv, a_t=given, on_chip=on_chip)
    scratch.slices.give(step)
    some = pl.ds(j * self.width, self.width)
    self.store(dv, self.outputs.dv.at[self.b, rows, self.n, some], 1, step)
    return dk, dp

  def keys(self, t) -> None:
    """dK, dV and what is summed along the columns of dP."""
    positions_smem = self.positions(1, t)
    inputs, scratch, on_chip = self.inputs, self.scratch, self.static.on_chip
    c, (q_smem, k_smem, numbers_smem, pairs) = self.first + t, self.tokens(t)
    here, rows, M = (self.b, self.n, c), pl.ds(c * CHUNK, CHUNK), q_smem[0].shape[1]
    shape = (CHUNK, CHUNK)
    write = lambda shape: along(plgpu.load(numbers_smem.at[WRITE], layout=ROW), 0, shape)
    load = functools.partial(plgpu.load, layout=COLUMN, optimized=False)
    column = lambda i: along(load(numbers_smem.at[i]), 1, shape)

    dk, dp = zeros(ROWS, M), zeros(*shape)
    if inputs.d_z is not None:
      dk = along(load(inputs.d_z.at[here]), 1, dk.shape)
    if scratch.pairs_smem is not None:
      weights = decay(numbers_smem, positions_smem, keys_first=True) * column(SCALE)
      weights = weights * hopper_parts.product(k_smem, q_smem, on_chip=on_chip)
      here_smem = hopper_parts.at(scratch.pairs_smem, hopper.unhoisted(jnp.int32(0), t))
      hopper_parts.store(weights, here_smem)
      plgpu.commit_smem()

    part = functools.partial(self.values, t, rows, write, bool(pairs))
    dk, dp = lax.fori_loop(0, self.slice_count(), part, (dk, dp))
    q_smem, k_smem, numbers_smem, _ = self.tokens_again(t, 64)
    dp = dp * column(SCALE)
    if inputs.d_z is not None:
      dp = dp + column(EXTRA)
    dk_gmem = self.outputs.dk.at[self.b, rows, self.n]
    i, j = hopper.positions(positions_smem)
    if pairs:
      plgpu.commit_smem()
      scratch.tokens.give(t)
      self.store(dk, dk_gmem, 1, t)
      self.store(jnp.where(j > i, dp, 0.0), self.outputs.d_pairs_t.at[here], 1, t)
      return
    dk = dk * write(dk.shape)
    self.put(c, 3, self.dot(k_smem, dk))
    dp = dp * decay(numbers_smem, positions_smem, keys_first=True)
    scores = hopper_parts.product(k_smem, q_smem, on_chip=on_chip)
    self.put(c, 2, jnp.where(j > i, scores * dp, 0.0).sum(axis=1))
    dk = hopper_parts.add(dk, dp, q_smem, on_chip=on_chip)
    scratch.tokens.give(t)
    self.store(dk, dk_gmem, 1, t)


def _kernel(static: Static, inputs: Inputs, counts, *refs, scratch: Scratch):
  outputs = Outputs(*refs, *(None,) * (len(Outputs._fields) - len(refs)))
  one = _Chunks(static, inputs, counts, outputs, scratch)
  hopper.specialize(static.plan, one.wg, compute=one.compute, feed=one.feed)


def gradients(inputs: Inputs, *, on_chip: bool) -> Outputs:
  """Of every chunk. dq, dk and dv are `B T N width`, of every head of the state."""
  B, N, chunks, M, h = inputs.states[0].shape
  T, dtype, half = inputs.v[0].shape[1], hopper_parts.dtype(inputs.v), inputs.v[0].dtype
  parts, width = len(inputs.v), columns(len(inputs.v))
  shape = jax.ShapeDtypeStruct
  types = [shape((B, T, N, width), dtype) for width in (M, M, h)]
  types += [shape((B, N, chunks, 4, CHUNK), jnp.float32), shape((B, N, chunks, M), jnp.float32)]
  if inputs.pairs is not None:
    types += [shape((B, N, chunks, CHUNK, CHUNK), dtype)] * 2
  stages = (2, 2) if M <= 128 and parts == 1 else (1, 1)
  plan = Plan(warpgroups=2, others=CHUNK, stages=stages)
  if M <= 128:  # registers for who reads up to 21 arrays
    plan = plan._replace(registers=232, feeder=40)
  tokens = [matrix(CHUNK, M, half, width)] * 2 * parts
  tokens.append(lambda count: plgpu.SMEM((count, *inputs.numbers.shape[3:]), jnp.float32))
  tokens += [] if inputs.pairs is None else [matrix(CHUNK, CHUNK, half, width)] * parts
  slices = [matrix(CHUNK, width, half)] * 2 * parts + [matrix(M, width, half)] * 2 * parts
  runs = -(-chunks // SPAN)
  counts = jnp.minimum(SPAN, chunks - SPAN * jnp.arange(runs, dtype=jnp.int32))
  counts = jnp.append(counts, jnp.full((1,), h // width, jnp.int32))
  results = hopper.launch(
    "linear_gradients",
    functools.partial(_kernel, Static(plan, chunks, N, h // width, on_chip)),
    plan,
    grid={"run": runs, "head": N, "batch": B},
    out_type=tuple(types),
    scratch=Scratch(
      Ring.of(2, plan.stages[0], *tokens),
      Ring.of(2, plan.stages[1], *slices),
      matrix(ROWS, width, dtype)(2),
      plgpu.SMEM((2, CHUNK), jnp.int32),
      (matrix(CHUNK, CHUNK, half, width)(1),) * parts if inputs.pairs is None else None,
    ),
  )(inputs, counts)
  return Outputs(*results, *(None,) * (len(Outputs._fields) - len(results)))
