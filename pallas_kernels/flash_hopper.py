"""Softmax attention on Hopper GPUs (sm_90a): what it supports, and the forward pass.

One block of threads has 2 x 64 queries of one head and three warpgroups:

    feeder      keys 0   values 0   keys 1   values 1 ...  as entries of the rings become free
    computer 0  S = Q K_t^T, O += P V_t-1 | softmax of S | S, O | softmax | ...
    computer 1                            | S, O | softmax | S, O | ...

The feeder's one thread starts bulk copies (TMA) into two rings in shared memory; rows beyond the
arrays arrive as zeros and leave nowhere, so T and S may be anything. A computer keeps its queries
in shared memory and the output, m and l in registers. In its turn it starts two products, the
scores of step t and the output of step t - 1, hands the turn on, and does the softmax of step t
while its second product and the other computer's run: the overlap within and between warpgroups of
Shah et al. 2024, https://arxiv.org/abs/2407.08608, sections 3.1 and 3.2.

Which key blocks a block of queries visits comes from the visits, read as scalars from global
memory: the mixed ones first, whose scores the rule masks, then the full ones in a loop without a
mask. Bias, infos and dense masks are read where they are needed by ordinary loads, from arrays that
are cut so that whole numbers name a tile.

Tiles: 128 keys a step where the output has at most 128 columns (H <= 192), else 64; two entries in
each ring. Registers: 240 per thread that computes, 24 per thread that feeds. Shared memory at H = h
= 128: Q 32 KiB, K and V 2 x 32 KiB each.

Floor: 4 T S H flops per head at 989 Tflop/s dense (half of it under a causal mask), bytes are
negligible. A step of a warpgroup at H = 128 is 1024 cycles of tensor core and, in machine code,
495 instructions per thread without a mask and 691 with a causal one (70 FMNMX, 70 FADD, 66 FFMA,
66 MUFU, 66 FMUL, 32 F2FP, no barrier of the whole block): about half of the other warpgroup's 1024
cycles. No chip has run it yet.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash_hopper_backward, hopper, tiles
from pallas_kernels.flash import PRIMITIVES as PRIMITIVES
from pallas_kernels.flash import Array, Blocks, Extras, Settings, Visits
from pallas_kernels.flash_hopper_tile import Reads, Static, Tile, reads, whole
from pallas_kernels.hopper import (
  ROWS,
  Plan,
  Ring,
  Turns,
  along,
  matrix,
  padded,
  pick,
  row_of,
  zeros,
)

backward = flash_hopper_backward.backward


def _plan(dtype, H: int, h: int) -> Plan:
  """The tiles of the forward pass for head widths that are padded already."""
  others = 128 if H <= 192 and h <= 128 else 64
  plan = Plan(warpgroups=2, others=others, stages=(2, 2))
  return hopper.tuned_plan(plan, "forward", dtype, H, h)


def blocks(q_shape, k_shape, v_shape, dtype, settings: Settings) -> Blocks:
  """The (block_q, block_k) in which the visits of each pass are to be counted."""
  del k_shape, settings
  H, h = padded(q_shape[-1]), padded(v_shape[-1])
  plan = _plan(dtype, H, h)
  d_query, d_key = flash_hopper_backward.plans(dtype, H, h)
  return Blocks(
    (plan.rows, plan.others), (d_query.rows, d_query.others), (d_key.others, d_key.rows)
  )


def unsupported(q, k, v, extras: Extras, settings: Settings) -> str | None:
  """Why these kernels refuse a call, or None."""
  del extras, settings
  if q.dtype not in (jnp.float16, jnp.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
    return f"it multiplies float16 or bfloat16, all alike, not {q.dtype}, {k.dtype}, {v.dtype}"
  for name, x in (("head_dim", q), ("value head_dim", v)):
    if x.shape[-1] > hopper.MAX_WIDTH:
      return f"{name} {x.shape[-1]} is more than {hopper.MAX_WIDTH}"
  return None


class _Inputs(NamedTuple):
  """What the kernel reads."""

  q: Any
  k: Any
  v: Any
  visits: Visits
  reads: Reads


class _Scratch(NamedTuple):
  """What lies in shared memory."""

  q_smem: Any
  q_here: Any
  keys: Ring
  values: Ring
  turns: Any
  out_smem: Any
  """None where the output has the shape of the queries and takes their place."""


class _Forward:
  """One block of queries of one head."""

  def __init__(self, static: Static, inputs: _Inputs, outputs, scratch: _Scratch):
    self.static, self.inputs, self.outputs, self.scratch = static, inputs, outputs, scratch
    self.b, self.n, self.wg = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    # The last block first: under a causal mask it is the longest.
    i = static.blocks - 1 - lax.axis_index("block")
    self.row = i * static.plan.warpgroups + self.wg
    self.where = pick(inputs.visits.full, self.b, self.n, i)
    self.full, self.active = inputs.visits.full[self.where], inputs.visits.active[self.where]

  def block(self, step):
    """The key block of a step. The mixed ones come first, so that the step before the loops may
    always mask.
    """
    return self.inputs.visits.order[(*self.where, self.active - 1 - step)]

  def feed(self) -> None:
    """The memory warpgroup: key and value blocks into the rings as they become free."""
    inputs, scratch, width = self.inputs, self.scratch, self.static.plan.others
    key_head = lax.div(self.n, self.static.group)

    def step(t, _):
      keys = (self.b, pl.ds(self.block(t) * width, width), key_head)
      scratch.keys.fill(t, inputs.k.at[keys])
      scratch.values.fill(t, inputs.v.at[keys])

    lax.fori_loop(0, self.active, step, None)
    scratch.keys.drain(self.active)
    scratch.values.drain(self.active)

  def compute(self) -> None:
    """A computing warpgroup: its `ROWS` queries against every key block that is visited."""
    m, l = row_of(-jnp.inf), row_of(0.0)
    if self.inputs.reads.sinks is not None:
      m, l = row_of(self.inputs.reads.sinks[self.n] * tiles.LOG2_E), row_of(1.0)
    acc = zeros(ROWS, self.inputs.v.shape[-1])
    pl.when(self.active == 0)(lambda: self.finish(m, l, acc))
    pl.when(self.active > 0)(lambda: self.finish(*self.visit(m, l, acc)))

  def visit(self, m, l, acc):
    """(m, l, acc) after every step. The product with V of a step runs behind the softmax of the
    next.
    """
    scratch, on_chip, dtype = self.scratch, self.static.on_chip, self.inputs.v.dtype
    q_smem, q_here = scratch.q_smem.at[self.wg], scratch.q_here.at[self.wg]
    rows = pl.ds(self.row * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(self.inputs.q.at[self.b, rows, self.n], q_smem, q_here)
    turns = Turns(scratch.turns, self.wg, self.static.plan.warpgroups)
    turns.start()
    plgpu.barrier_wait(q_here)
    (k_smem,) = scratch.keys.take(0)
    first = hopper.product(q_smem, k_smem, on_chip=on_chip)
    m, l, _, p = self.update(0, True, m, l, first)

    def step(t, carry, masked):
      m, l, acc, p = carry
      (v_smem,), (k_smem,) = scratch.values.take(t - 1), scratch.keys.take(t)
      turns.wait()
      (m, l, alpha, p), acc = hopper.product_behind(
        scratch.q_smem.at[hopper.unhoisted(self.wg, t)], k_smem, acc, p, v_smem,
        (m, l, m, zeros(*first.shape)), issued=turns.give,
        update=functools.partial(self.update, t, masked, m, l), on_chip=on_chip,
      )  # fmt: skip
      scratch.values.give(t - 1)
      return m, l, acc * along(alpha, 0, acc.shape), p.astype(dtype)

    mixed = jnp.maximum(self.active - self.full, 1)
    carry = m, l, acc, p.astype(dtype)
    carry = lax.fori_loop(1, mixed, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(mixed, self.active, functools.partial(step, masked=False), carry)
    m, l, acc, p = carry
    turns.end()
    (v_smem,) = scratch.values.take(self.active - 1)
    (acc,) = hopper.add_products((acc, p, v_smem), on_chip=on_chip)
    scratch.values.give(self.active - 1)
    return m, l, acc

  def update(self, t, masked: bool, m, l, product):
    """(m, l, alpha, p) after one more tile of scores: the weights so far are alpha of what they
    were.
    """
    self.scratch.keys.give(t)
    width = self.static.plan.others
    tile = Tile(
      self.static.settings, self.inputs.reads, self.b, self.n, self.row, self.block(t), width
    )
    x, factor, _ = tile.scores(product)
    if masked:
      x = jnp.where(tile.allowed(), x, -jnp.inf)
    m_next = jnp.maximum(m, x.max(axis=1) * factor)
    base = tiles.finite(m_next)
    p = jnp.exp2(x * factor - along(base, 0, x.shape))
    alpha = jnp.exp2(m - base)
    return m_next, l * alpha + p.sum(axis=1), alpha, tile.dropped(p)

  def finish(self, m, l, acc) -> None:
    """The output, m and l go out. A row that saw nothing has l = 0 and m = -inf."""
    out_gmem, m_gmem, l_gmem = self.outputs
    share = jnp.where(l > 0.0, 1.0 / ((1.0 - self.static.settings.dropout_rate) * l), 0.0)
    out = (acc * along(share, 0, acc.shape)).astype(out_gmem.dtype)
    m_gmem[self.b, self.n, self.row], l_gmem[self.b, self.n, self.row] = m, l
    rows = pl.ds(self.row * ROWS, ROWS)
    room = self.scratch.q_smem if self.scratch.out_smem is None else self.scratch.out_smem
    hopper.store(out, room.at[self.wg], out_gmem.at[self.b, rows, self.n])


def _kernel(static: Static, inputs: _Inputs, *outputs, scratch: _Scratch):
  one = _Forward(static, inputs, outputs, scratch)
  hopper.specialize(static.plan, one.wg, compute=one.compute, feed=one.feed)


def forward(
  q: Array,
  k: Array,
  v: Array,
  extras: Extras,
  settings: Settings,
  by_query: Visits,
  *,
  on_chip: bool = True,
) -> tuple[Array, Array, Array]:
  """The output `B T N h` in v's dtype, m and l `B N T`, float32; `on_chip=False` for the
  interpreter.
  """
  B, T, N, _ = q.shape
  S, K, width = v.shape[1:]
  q, k, v = map(whole, (q, k, v))
  H, h = q.shape[-1], v.shape[-1]
  plan = _plan(q.dtype, H, h)
  count, workers = -(-T // plan.rows), plan.warpgroups
  loads = extras.bias is not None or bool(extras.k_info)
  scratch = _Scratch(
    q_smem=matrix(ROWS, H, q.dtype)(workers),
    q_here=plgpu.Barrier(num_barriers=workers),
    keys=Ring.of(workers, plan.stages[0], matrix(plan.others, H, k.dtype)),
    values=Ring.of(workers, plan.stages[1], matrix(plan.others, h, v.dtype)),
    turns=plgpu.Barrier(num_barriers=workers),
    out_smem=None if h == H else matrix(ROWS, hopper.slice_width(h), v.dtype)(workers),
  )
  row = jax.ShapeDtypeStruct((B, N, count * workers, ROWS), jnp.float32)
  out, m, l = hopper.launch(
    "flash_forward",
    functools.partial(_kernel, Static(plan, settings, N // K, count, on_chip)),
    plan,
    grid={"head": N, "block": count, "batch": B},
    out_type=(jax.ShapeDtypeStruct((B, q.shape[1], N, h), v.dtype), row, row),
    scratch=scratch,
  )(_Inputs(q, k, v, by_query, reads(extras, T, S, plan, load_positions=loads)))
  m, l = (x.reshape(B, N, -1)[..., :T] for x in (m, l))
  return out[:, :T, :, :width], m, l
