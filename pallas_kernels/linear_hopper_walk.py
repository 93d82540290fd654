"""The walk along the sequence: a state in registers, chunk after chunk, on Hopper GPUs (sm_90a).

    O = read (Q S) + P V         P = (Q K^T) E, E_ij = exp(g_{j+1} + ... + g_i) for j <= i, else 0
    S = fade S + K^T (write V)

One block of threads has one head's state, or 64 or 128 columns of it, and 64 columns a computing
warpgroup, in float32 as an accumulator: `M` / 2 registers of a thread per 64 columns. The feeding
warpgroup brings a chunk's q, k, v and decays into a ring. What a computer multiplies is bfloat16:
the state goes to shared memory before every chunk, `write V` takes the place of V in the ring, P is
in registers. Computers do not wait for each other; each makes its own P, for tensor cores are idle
most of the time: the pass is bound by bytes.

float32 comes and is multiplied as three bfloat16 (`hopper_parts`), 32 columns a warpgroup.

The same walk without outputs writes the states that enter every chunk, and backward in time, with
q, the output's gradient and `read` for k, v and `write`, the gradients of those that leave them.

With decays per channel q and k come as `linear_hopper_channel` makes them, faded already, and P
comes from there. A gradient's scales are applied to it all the same.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, hopper_parts
from pallas_kernels.hopper import COLUMN, ROW, ROWS, TILE, Plan, Ring, along, matrices, matrix
from pallas_kernels.hopper_parts import Parts
from pallas_kernels.linear_tiles import CHUNK, Array

COLUMNS = 64
"""Of the state, that a warpgroup has, or two of float32."""


def columns(parts: int) -> int:
  """Of the state, or of v, that a warpgroup works on at once."""
  return COLUMNS // 2 if parts > 1 else COLUMNS


HI, LO, READ, WRITE, EXTRA, SCALE = range(6)
"""The rows of the numbers of a chunk, `B N C 6 CHUNK`. EXTRA is, of a normalized output, what the
state that enters adds to its weight; of its gradient, the gradient of the weight. SCALE is what the
gradient of an output is to be multiplied by.
"""


class Static(NamedTuple):
  """What a walk knows before anything runs."""

  plan: Plan
  chunks: int
  reverse: bool
  heads: int
  scale: float
  normalize: bool
  on_chip: bool


class Inputs(NamedTuple):
  """What it reads. Without q there is no output, and the states of every chunk are written."""

  q: Parts | None
  k: Parts
  v: Parts
  numbers: Any
  fade: Any
  """`B N C M`."""
  pairs: Parts | None
  """P of decays per channel, `B N C CHUNK CHUNK`, or None."""
  start: Any
  """`B N M h`, float32."""


class Outputs(NamedTuple):
  """What it writes, or None."""

  out: Any
  weight: Any
  """`B N C CHUNK`."""
  states: Parts | None
  """`B N C M h`, before every chunk."""
  last: Any


class Scratch(NamedTuple):
  """What lies in shared memory."""

  ring: Ring
  state_smem: Parts
  out_smem: Any
  positions_smem: Any
  """Of each computing warpgroup."""


def head(x, n: Array, heads: int) -> Array | int:
  """The head of x that head n of the state reads."""
  return lax.div(n, heads // x.shape[2])


def decay(numbers_smem, positions_smem, *, keys_first: bool) -> Array:
  """How far every write has faded when it is read, and 0 where the read comes first."""
  shape = (CHUNK, CHUNK)
  row = lambda i: along(plgpu.load(numbers_smem.at[i], layout=ROW), 0, shape)
  # Where one buffer is read both ways, the search for layouts ends only if one way may be slow.
  load = functools.partial(plgpu.load, layout=COLUMN, optimized=False)
  column = lambda i: along(load(numbers_smem.at[i]), 1, shape)
  x = (row(HI) - column(HI)) + (row(LO) - column(LO))
  i, j = hopper.positions(positions_smem)
  x, allowed = (-x, j >= i) if keys_first else (x, j <= i)
  return jnp.exp2(jnp.where(allowed, x, -jnp.inf))


class _Walk:
  """The state of one head, or some columns of it."""

  def __init__(self, static: Static, inputs: Inputs, count, outputs: Outputs, scratch: Scratch):
    self.static, self.inputs, self.outputs, self.scratch = static, inputs, outputs, scratch
    self.count = count
    self.b, self.n, self.part, self.wg = (
      lax.axis_index(name) for name in ("batch", "head", "part", "warpgroup")
    )

  def columns(self, i):
    """Those of a warpgroup."""
    width = columns(len(self.inputs.k))
    return pl.ds((self.part * self.static.plan.warpgroups + i) * width, width)

  def chunk(self, step):
    """The chunk of a step."""
    return self.static.chunks - 1 - step if self.static.reverse else step

  def feed(self) -> None:
    """The memory warpgroup: chunk after chunk into the ring."""
    inputs, ring, heads = self.inputs, self.scratch.ring, self.static.heads

    def step(t, _):
      c = self.chunk(t)
      rows, here = pl.ds(c * CHUNK, CHUNK), (self.b, self.n, c)
      of = lambda x: x.at[self.b, rows, head(x, self.n, heads)]
      v_head, computers = head(inputs.v[0], self.n, heads), range(self.static.plan.warpgroups)
      values = [
        tuple(x.at[self.b, rows, v_head, self.columns(i)] for i in computers) for x in inputs.v
      ]
      sources = [*map(of, inputs.k), *values, inputs.numbers.at[here], inputs.fade.at[here]]
      if inputs.q is not None:
        sources += [*map(of, inputs.q), *hopper_parts.at(inputs.pairs or (), *here)]
      ring.fill(t, *sources)

    lax.fori_loop(0, self.static.chunks, step, None)
    ring.drain(jnp.int32(self.static.chunks))

  def compute(self) -> None:
    """A computing warpgroup: its columns of the state along the sequence."""
    mine = (self.b, self.n, slice(None), self.columns(self.wg))
    state = plgpu.load(self.inputs.start.at[mine], layout=TILE, optimized=False)
    hopper.write_positions(self.scratch.positions_smem.at[self.wg])
    state = lax.fori_loop(0, self.count[0], self.step, state)
    plgpu.wait_smem_to_gmem(0)
    last_gmem = self.outputs.last.at[mine]
    last_gmem[...] = state

  def step(self, t, state):
    """One more chunk."""
    inputs, outputs, static, c = self.inputs, self.outputs, self.static, self.chunk(t)
    wg = hopper.unhoisted(self.wg, t)
    state_smem = hopper_parts.at(self.scratch.state_smem, wg)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    hopper_parts.store(state, state_smem)
    plgpu.commit_smem()
    if outputs.states is not None:
      here = (self.b, self.n, c, slice(None), self.columns(self.wg))
      for part_smem, states_gmem in zip(state_smem, outputs.states, strict=True):
        plgpu.copy_smem_to_gmem(part_smem, states_gmem.at[here])
    many, taken = len(inputs.k), self.scratch.ring.take(t)
    k_smem, v_smem = taken[:many], hopper_parts.at(taken[many : 2 * many], self.wg)
    numbers_smem, fade_smem, *reads = taken[2 * many :]
    if reads:
      self.output(c, wg, reads, k_smem, v_smem, numbers_smem, state_smem)
    if inputs.pairs is None or static.reverse:
      v = hopper_parts.load(v_smem)
      row = plgpu.load(numbers_smem.at[READ if static.reverse else WRITE], layout=ROW)
      hopper_parts.store(v * along(row, 0, v.shape), v_smem)
      plgpu.commit_smem()
    fade = along(plgpu.load(fade_smem, layout=ROW), 0, state.shape)
    state = hopper_parts.multiply(k_smem, v_smem, state * fade, a_t=True, on_chip=static.on_chip)
    self.scratch.ring.give(t)
    return state

  def output(self, c, wg, reads, k_smem, v_smem, numbers_smem, state_smem) -> None:
    """What a chunk's queries read."""
    static, on_chip, many = self.static, self.static.on_chip, len(k_smem)
    q_smem, pairs = reads[:many], reads[many:]
    if pairs:
      weights = hopper_parts.load(pairs)
    else:
      # The other way round there would be no registers for both, with keys of 256.
      weights = decay(numbers_smem, self.scratch.positions_smem.at[wg], keys_first=False)
      weights = weights * hopper_parts.product(q_smem, k_smem, on_chip=on_chip)
    weight = None
    if static.normalize:
      weight = weights.sum(axis=1)
      weight = weight + plgpu.load(numbers_smem.at[EXTRA], layout=ROW)
    out = hopper_parts.multiply(q_smem, state_smem, on_chip=on_chip)
    if not pairs:
      out = out * along(plgpu.load(numbers_smem.at[READ], layout=ROW), 0, out.shape)
    out = hopper_parts.add(out, weights, v_smem, on_chip=on_chip)
    if weight is not None:
      inverse = jnp.where(weight == 0.0, 0.0, 1.0 / weight)
      out = out * along(inverse, 0, out.shape)
      first = (self.part == 0) & (self.wg == 0)

      @pl.when(first)
      def _():
        self.outputs.weight.at[self.b, self.n, c][...] = weight
    else:
      out = out * static.scale
    out_smem = self.scratch.out_smem.at[wg]
    out_smem[...] = out.astype(out_smem.dtype)
    plgpu.commit_smem()
    rows = pl.ds(c * CHUNK, CHUNK)
    plgpu.copy_smem_to_gmem(
      out_smem, self.outputs.out.at[self.b, rows, self.n, self.columns(self.wg)]
    )


def _kernel(
  static: Static, inputs: Inputs, count, *refs, scratch: Scratch, wants: tuple[bool, ...]
):
  refs = iter(refs)
  outputs = Outputs(*(next(refs) if wanted else None for wanted in wants))
  one = _Walk(static, inputs, count, outputs, scratch)
  hopper.specialize(static.plan, one.wg, compute=one.compute, feed=one.feed)


def plan(M: int, h: int, states: int, parts: int = 1) -> Plan:
  """Two computers where that leaves a block for most of the 132 multiprocessors and wide keys leave
  room for two entries in the ring; always of float32, which leaves room for one entry, and whose
  feeder has three times as many arrays to read.
  """
  if parts > 1:
    return Plan(warpgroups=2, others=CHUNK, stages=(1, 0), registers=232, feeder=40)
  two = h % (2 * COLUMNS) == 0 and M <= 128 and states * (h // (2 * COLUMNS)) >= 96
  return Plan(warpgroups=2 if two else 1, others=CHUNK, stages=(2, 0))


def walk(
  inputs: Inputs,
  *,
  reverse: bool = False,
  scale: float = 1.0,
  normalize: bool = False,
  on_chip: bool,
) -> Outputs:
  """The outputs of the walk over every chunk."""
  q, k, v, numbers, fade, pairs, start = inputs
  B, N, M, h = start.shape
  chunks, T, dtype, parts = fade.shape[2], v[0].shape[1], hopper_parts.dtype(v), len(v)
  one, width = plan(M, h, B * N, parts), columns(parts)
  workers, half = one.warpgroups, v[0].dtype
  shape = jax.ShapeDtypeStruct
  outputs = Outputs(
    None if q is None else shape((B, T, N, h), dtype),
    shape((B, N, chunks, CHUNK), jnp.float32) if normalize else None,
    (shape((B, N, chunks, M, h), half),) * parts if q is None else None,
    shape((B, N, M, h), jnp.float32),
  )
  buffers = [
    *[matrix(CHUNK, M, half, width)] * parts,
    *[matrices(workers, CHUNK, width, half)] * parts,
    lambda count: plgpu.SMEM((count, *numbers.shape[3:]), jnp.float32),
    hopper.numbers(M),
  ]
  if q is not None:
    buffers += [matrix(CHUNK, M, half, width)] * parts
    buffers += [] if pairs is None else [matrix(CHUNK, CHUNK, half)] * parts
  static = Static(one, chunks, reverse, N, scale, normalize, on_chip)
  wants = tuple(x is not None for x in outputs)
  results = hopper.launch(
    "linear_states" if q is None else "linear_forward",
    functools.partial(_kernel, static, wants=wants),
    one,
    grid={"part": h // (workers * width), "head": N, "batch": B},
    out_type=tuple(x for x in outputs if x is not None),
    scratch=Scratch(
      Ring.of(workers, one.stages[0], *buffers),
      (matrix(M, width, half)(workers),) * parts,
      None if q is None else matrix(ROWS, width, dtype)(workers),
      plgpu.SMEM((workers, CHUNK), jnp.int32),
    ),
  )(inputs, jnp.full((1,), chunks, jnp.int32))
  results = iter(results)
  return Outputs(*(next(results) if wanted else None for wanted in wants))
