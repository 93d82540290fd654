"""The gradients of softmax attention on Hopper GPUs (sm_90a): no atomics, so two runs have the same
bits; nothing is visited that the forward pass does not visit.

Two kernels, each with one feeding and two computing warpgroups as in `flash_hopper`:

    flash_d_query    rows are queries, a loop over the key blocks that they visit
        S = Q K^T, dP = dO V^T    P = 2^(S - base), dS = P (dP - delta)    dQ += dS K
    flash_dk_dv      rows are keys of one key head, a loop over its query heads and over the query
                     blocks that visit them, so the sum over a group of heads is in registers
        S^T = K Q^T    P^T    dP^T = V dO^T - delta, dV += P^T dO    dS^T    dK += dS^T Q

With the keys as rows, P^T and dS^T are operands in registers; so is dS in the first. Together seven
products for the five of a kernel that adds dQ up by atomics: the price of the same bits. dP begins
with -delta, which then needs no registers of its own. The two computers take no turns: while one
does elementwise work the other's products run. In flash_d_query dP runs behind the P of its own
step, too, but for mixed blocks with a bias, dropout or arrays that the rule reads: what these need
lies in dP's registers first.

flash_dk_dv needs (H + h) / 2 registers per thread for its sums. Beyond H + h = 256 it runs twice,
as flash_dk (three products) and flash_dv (two). flash_d_bias, only where there is a bias: a tile of
the bias' gradient stays in registers while the kernel recomputes every tile of dS that it was added
to, so a broadcast axis is a loop, and no array is larger than the bias.

Tiles: 128 queries x 128 keys up to H = 128 in flash_d_query, else 128 x 64; 64 queries x 128 keys
in flash_dk_dv. Registers 240 and 24. Floor: 14 T S H flops per head (10 with atomics) at 989
Tflop/s. A step of 64 x 64 of flash_dk_dv at H = 128 is 1024 cycles of tensor core per warpgroup and
295 instructions; of 64 x 128 of flash_d_query 1536 cycles and 417. No chip has run it yet.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, tiles
from pallas_kernels.flash import Array, Extras, Settings, Visits
from pallas_kernels.flash_hopper_tile import Reads, Static, Tile, reads, whole
from pallas_kernels.hopper import (
  COLUMN,
  ROW,
  ROWS,
  Plan,
  Ring,
  along,
  matrix,
  numbers,
  pick,
  row_of,
  zeros,
)


def plans(dtype, H: int, h: int) -> tuple[Plan, Plan]:
  """The tiles of the queries' gradient and of the keys'."""
  d_key = Plan(warpgroups=2, others=64, stages=(2, 2) if H + h <= 384 else (2, 1))
  d_query = d_key._replace(others=128) if max(H, h) <= 128 else d_key
  one = lambda plan, what: hopper.tuned_plan(plan, what, dtype, H, h)
  return one(d_query, "d_query"), one(d_key, "d_key")


def _bias_plan(dtype, H: int, h: int) -> Plan:
  """The tiles of the bias' gradient: blocks as in the queries' gradient, whose visits it reads."""
  blocks, _ = plans(dtype, H, h)
  return blocks


class _Inputs(NamedTuple):
  """What both kernels read. In the queries' gradient `base` and `delta` are `B N tiles
  ROWS`, in the keys' they are `B N positions` and delta comes negated.
  """

  q: Any
  k: Any
  v: Any
  d_out: Any
  base: Any
  delta: Any
  visits: Visits
  reads: Reads


def _probabilities(tile: Tile, masked: bool, base: Array, product: Array):
  """(p, tanh of the logit cap or None). Masked where the exponent is one fused multiply-add."""
  x, factor, tanh = tile.scores(product)
  exponent = x * factor - base
  if masked:
    exponent = jnp.where(tile.allowed(), exponent, -jnp.inf)
  return jnp.exp2(exponent), tanh


class _QueryScratch(NamedTuple):
  """Shared memory of the queries' gradient."""

  q_smem: Any
  d_smem: Any
  here: Any
  keys: Ring
  values: Ring


class _DQuery:
  """The gradient of one block of queries of one head."""

  def __init__(self, static: Static, inputs: _Inputs, outputs, scratch: _QueryScratch):
    self.static, self.inputs, self.outputs, self.scratch = static, inputs, outputs, scratch
    self.b, self.n, self.wg = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    i = static.blocks - 1 - lax.axis_index("block")
    self.row = i * static.plan.warpgroups + self.wg
    self.where = pick(inputs.visits.full, self.b, self.n, i)
    self.full, self.active = inputs.visits.full[self.where], inputs.visits.active[self.where]

  def feed(self) -> None:
    """The memory warpgroup: key and value blocks into the rings as they become free."""
    inputs, scratch, width = self.inputs, self.scratch, self.static.plan.others
    key_head = lax.div(self.n, self.static.group)

    def step(t, _):
      block = inputs.visits.order[(*self.where, t)]
      keys = (self.b, pl.ds(block * width, width), key_head)
      scratch.keys.fill(t, inputs.k.at[keys])
      scratch.values.fill(t, inputs.v.at[keys])

    lax.fori_loop(0, self.active, step, None)
    scratch.keys.drain(self.active)
    scratch.values.drain(self.active)

  def compute(self) -> None:
    """A computing warpgroup: its `ROWS` queries against every key block that is visited."""
    inputs, here = self.inputs, self.scratch.here.at[self.wg]
    rows = (self.b, pl.ds(self.row * ROWS, ROWS), self.n)
    q_smem, d_smem = (x.at[self.wg] for x in (self.scratch.q_smem, self.scratch.d_smem))
    plgpu.copy_gmem_to_smem(inputs.q.at[rows], q_smem, here)
    plgpu.copy_gmem_to_smem(inputs.d_out.at[rows], d_smem, here)
    base, delta = (
      plgpu.load(x.at[self.b, self.n, self.row], layout=ROW, optimized=False)
      for x in (inputs.base, inputs.delta)
    )
    plgpu.barrier_wait(here)
    step = functools.partial(self.step, base, delta)
    carry = zeros(ROWS, inputs.q.shape[-1]), row_of(0.0)
    carry = lax.fori_loop(0, self.full, functools.partial(step, masked=False), carry)
    dq, d_slope = lax.fori_loop(self.full, self.active, functools.partial(step, masked=True), carry)
    dq_gmem, *slopes_gmem = self.outputs
    dq = (dq * self.static.settings.scale).astype(dq_gmem.dtype)
    hopper.store(dq, q_smem, dq_gmem.at[rows])
    for slope_gmem in slopes_gmem:
      slope_gmem[self.b, self.n, self.row] = d_slope

  def step(self, base, delta, t, carry, masked):
    """One more key block."""
    wg = hopper.unhoisted(self.wg, t)
    q_smem, d_smem = (x.at[wg] for x in (self.scratch.q_smem, self.scratch.d_smem))
    dq, d_slope = carry
    inputs, scratch, on_chip = self.inputs, self.scratch, self.static.on_chip
    (k_smem,), (v_smem,) = scratch.keys.take(t), scratch.values.take(t)
    width = self.static.plan.others
    block = inputs.visits.order[(*self.where, t)]
    tile = Tile(self.static.settings, inputs.reads, self.b, self.n, self.row, block, width)
    shape = tile.shape

    def then(p_and_tanh, dp):
      scratch.values.give(t)
      p, tanh = p_and_tanh
      ds = tiles.d_scores(p, tile.dropped(dp, rescale=True), along(delta, 0, shape))
      return ds, tiles.d_product(ds, tanh, scale=1.0).astype(inputs.k.dtype)

    ds, dx = hopper.two_products(
      q_smem, k_smem, d_smem, v_smem, then=then, on_chip=on_chip,
      apart=masked and inputs.reads.crowd,
      first=functools.partial(_probabilities, tile, masked, along(base, 0, shape)),
    )  # fmt: skip
    (dq,) = hopper.add_products((dq, dx, k_smem), on_chip=on_chip)
    scratch.keys.give(t)
    if inputs.reads.slopes is not None:
      d_slope = d_slope - (ds * tiles.distance(*tile.positions())).sum(axis=1)
    return dq, d_slope


class _KeyScratch(NamedTuple):
  """Shared memory of the keys' gradient."""

  k_smem: Any
  v_smem: Any
  here: Any
  queries: Ring
  """With their base."""
  gradients: Ring
  """Of the output, with -delta."""


class _DKey:
  """The gradient of one block of keys and values of one key head: of both, or of one of them."""

  def __init__(self, static: Static, wants, inputs: _Inputs, outputs, scratch: _KeyScratch):
    self.static, self.inputs, self.outputs, self.scratch = static, inputs, outputs, scratch
    self.wants = wants
    self.b, self.head, self.wg = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    self.j = lax.axis_index("block")
    self.row = self.j * static.plan.warpgroups + self.wg

  def over_heads(self, body, carry):
    """`body(n, where, full, active, carry)` for every query head of the key head."""
    visits = self.inputs.visits

    def one(g, carry):
      n = self.head * self.static.group + g
      where = pick(visits.full, self.b, n, self.j)
      return body(n, where, visits.full[where], visits.active[where], carry)

    return (
      one(0, carry) if self.static.group == 1 else lax.fori_loop(0, self.static.group, one, carry)
    )

  def feed(self) -> None:
    """The memory warpgroup: query blocks and what belongs to them, head after head."""
    inputs, scratch, width = self.inputs, self.scratch, self.static.plan.others

    def head(n, where, full, active, before):
      def step(s, _):
        at = pl.ds(inputs.visits.order[(*where, s)] * width, width)
        queries, values = (self.b, at, n), (self.b, n, at)
        scratch.queries.fill(before + s, inputs.q.at[queries], inputs.base.at[values])
        scratch.gradients.fill(before + s, inputs.d_out.at[queries], inputs.delta.at[values])

      lax.fori_loop(0, active, step, None)
      return before + active

    steps = self.over_heads(head, jnp.int32(0))
    scratch.queries.drain(steps)
    scratch.gradients.drain(steps)

  def compute(self) -> None:
    """A computing warpgroup: its `ROWS` keys against every query block that visits them."""
    inputs, here = self.inputs, self.scratch.here.at[self.wg]
    rows = (self.b, pl.ds(self.row * ROWS, ROWS), self.head)
    k_smem, v_smem = (x.at[self.wg] for x in (self.scratch.k_smem, self.scratch.v_smem))
    plgpu.copy_gmem_to_smem(inputs.k.at[rows], k_smem, here)
    plgpu.copy_gmem_to_smem(inputs.v.at[rows], v_smem, here)
    plgpu.barrier_wait(here)

    def head(n, where, full, active, carry):
      before, sums = carry
      step = functools.partial(self.step, n, where, before)
      sums = lax.fori_loop(0, full, functools.partial(step, masked=False), sums)
      sums = lax.fori_loop(full, active, functools.partial(step, masked=True), sums)
      return before + active, sums

    widths = {"dk": inputs.k.shape[-1], "dv": inputs.v.shape[-1]}
    sums = {name: zeros(ROWS, widths[name]) for name in self.wants}
    _, sums = self.over_heads(head, (jnp.int32(0), sums))
    for name, out_gmem in zip(self.wants, self.outputs, strict=True):
      factor, room = (self.static.settings.scale, k_smem) if name == "dk" else (1.0, v_smem)
      hopper.store((sums[name] * factor).astype(out_gmem.dtype), room, out_gmem.at[rows])

  def step(self, n, where, before, s, sums, masked):
    """One more query block of head n."""
    inputs, scratch, on_chip = self.inputs, self.scratch, self.static.on_chip
    t, width = before + s, self.static.plan.others
    wg = hopper.unhoisted(self.wg, t)
    k_smem, v_smem = (x.at[wg] for x in (self.scratch.k_smem, self.scratch.v_smem))
    (q_smem, base_smem), (d_smem, delta_smem) = scratch.queries.take(t), scratch.gradients.take(t)
    block = inputs.visits.order[(*where, s)]
    tile = Tile(
      self.static.settings, inputs.reads, self.b, n, self.row, block, width, keys_first=True
    )
    row = lambda ref: along(plgpu.load(ref, layout=COLUMN), 1, tile.shape)
    s_product = hopper.product(k_smem, q_smem, on_chip=on_chip)
    p, tanh = _probabilities(tile, masked, row(base_smem), s_product)
    weights = tile.dropped(p, rescale=True).astype(d_smem.dtype)
    # Without dropout dP - delta is one product that begins with -delta, which needs no registers of
    # its own.
    dropout = inputs.reads.seeds is not None

    def d_scores(dp):
      if dropout:
        dp = tile.dropped(dp, rescale=True) + row(delta_smem)
      return (tiles.d_product(p * dp, tanh, scale=1.0),)

    values = functools.partial(
      self.d_values, sums.get("dv"), weights, v_smem, d_smem, d_scores, like=p
    )
    dx, dv = values(None if dropout or "dk" not in sums else row(delta_smem))
    scratch.gradients.give(t)
    new = {"dv": dv}
    if "dk" in sums:
      terms = sums["dk"], dx.astype(q_smem.dtype), q_smem
      (new["dk"],) = hopper.add_products(terms, on_chip=on_chip)
    scratch.queries.give(t)
    return {name: new[name] for name in sums}

  def d_values(self, dv, weights, v_smem, d_smem, d_scores, start, *, like) -> tuple[Any, Any]:
    """(the gradient of the products, dv with one more block), of which one may be None: nobody
    wants it.
    """
    on_chip = self.static.on_chip
    if "dk" not in self.wants:
      return None, *hopper.add_products((dv, weights, d_smem), on_chip=on_chip)
    if "dv" not in self.wants:
      return *d_scores(hopper.product(v_smem, d_smem, start, on_chip=on_chip)), None
    (dx,), dv = hopper.product_behind(
      v_smem, d_smem, dv, weights, d_smem, (like,), update=d_scores, start=start, on_chip=on_chip
    )
    return dx, dv


class _BiasScratch(NamedTuple):
  """Shared memory of the bias' gradient."""

  queries: Ring
  """A tile of each warpgroup, with that of the output's gradient."""
  keys: Ring
  """With the values."""
  out_smem: Any


class _DBias:
  """The gradient of one tile of the bias, summed over all tiles of scores that it was added to: an
  axis that the bias does not have is a loop here.
  """

  def __init__(self, static: Static, lengths, inputs: _Inputs, state, out_gmem, scratch):
    self.static, self.inputs, self.state = static, inputs, state
    self.out_gmem, self.scratch = out_gmem, scratch
    self.wg = lax.axis_index("warpgroup")
    columns = out_gmem.shape[3] // static.plan.others
    n, r, c = (lax.axis_index(name) for name in ("head", "row", "column"))
    self.at = (lax.div(c, columns), n, r, lax.rem(c, columns))
    self.lengths = lengths
    """How far each of those axes is a loop."""

  def over_tiles(self, body, carry):
    """`body(step, b, n, i, j, carry)` for every tile that is visited; returns (steps, carry)."""

    def one(e, steps_and_carry):
      steps, carry = steps_and_carry
      index, rest = [], e
      for at, length in zip(reversed(self.at), reversed(self.lengths), strict=True):
        index.append(at if length == 1 else lax.rem(rest, length))
        rest = rest if length == 1 else lax.div(rest, length)
      where = tuple(reversed(index))
      visited = self.state[pick(self.state, *where)]
      visit = lambda carry: (steps + 1, body(steps, *where, carry))
      return lax.cond(visited > 0, visit, lambda carry: (steps, carry), carry)

    return lax.fori_loop(0, math.prod(self.lengths), one, (jnp.int32(0), carry))

  def feed(self) -> None:
    """The memory warpgroup: the four operands of every tile that is visited."""
    inputs, scratch, plan = self.inputs, self.scratch, self.static.plan

    def tile(t, b, n, i, j, carry):
      rows = b, pl.ds(i * plan.rows, plan.rows), n
      keys = b, pl.ds(j * plan.others, plan.others), lax.div(n, self.static.group)
      scratch.queries.fill(t, inputs.q.at[rows], inputs.d_out.at[rows])
      scratch.keys.fill(t, inputs.k.at[keys], inputs.v.at[keys])
      return carry

    steps, _ = self.over_tiles(tile, jnp.int32(0))
    scratch.queries.drain(steps)
    scratch.keys.drain(steps)

  def compute(self) -> None:
    """A computing warpgroup: `ROWS` rows of the tile."""
    inputs, scratch, plan = self.inputs, self.scratch, self.static.plan

    def tile(t, b, n, i, j, total):
      mine = pl.ds(self.wg * ROWS, ROWS)
      q_smem, d_smem = (x.at[mine] for x in scratch.queries.take(t))
      k_smem, v_smem = scratch.keys.take(t)
      row = i * plan.warpgroups + self.wg
      tile = Tile(self.static.settings, inputs.reads, b, n, row, j, plan.others)
      base, delta = (
        along(plgpu.load(x.at[b, n, row], layout=ROW, optimized=False), 0, tile.shape)
        for x in (inputs.base, inputs.delta)
      )
      then = lambda p_and_tanh, dp: p_and_tanh[0] * (tile.dropped(dp, rescale=True) - delta)
      ds = hopper.two_products(
        q_smem, k_smem, d_smem, v_smem, then=then, on_chip=self.static.on_chip,
        first=functools.partial(_probabilities, tile, True, base),
      )  # fmt: skip
      scratch.queries.give(t)
      scratch.keys.give(t)
      return total + ds

    _, total = self.over_tiles(tile, zeros(ROWS, plan.others))
    b, n, r, c = self.at
    rows = pl.ds((r * plan.warpgroups + self.wg) * ROWS, ROWS)
    room = scratch.out_smem.at[self.wg]
    hopper.store(total, room, self.out_gmem.at[b, n, rows, pl.ds(c * plan.others, plan.others)])


def _bias_kernel(static: Static, lengths, inputs: _Inputs, state, out_gmem, *, scratch):
  one = _DBias(static, lengths, inputs, state, out_gmem, scratch)
  hopper.specialize(static.plan, one.wg, compute=one.compute, feed=one.feed)


def _query_kernel(static: Static, inputs: _Inputs, *outputs, scratch):
  one = _DQuery(static, inputs, outputs, scratch)
  hopper.specialize(static.plan, one.wg, compute=one.compute, feed=one.feed)


def _key_kernel(static: Static, wants, inputs: _Inputs, *outputs, scratch):
  one = _DKey(static, wants, inputs, outputs, scratch)
  hopper.specialize(static.plan, one.wg, compute=one.compute, feed=one.feed)


def _padded(x: Array, length: int, value: float) -> Array:
  return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])), constant_values=value)


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
  *,
  on_chip: bool = True,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
  """(dq, dk, dv, d_bias, d_slopes); `d_out`, `base` and `delta` as in `flash.Rows`."""
  shapes = q.shape, k.shape, v.shape
  q, k, v, d_out = map(whole, (q, k, v, d_out))
  given = q, k, v, d_out, base, delta
  dq, d_slopes = _d_query(*given, extras, settings, by_query, on_chip)
  dk, dv = _d_key(*given, extras, settings, by_key, on_chip)
  d_bias = None if extras.bias is None else _d_bias(*given, extras, settings, by_query, on_chip)
  dq, dk, dv = (
    x[:, :length, :, :width] for x, (_, length, _, width) in zip((dq, dk, dv), shapes, strict=True)
  )
  return dq, dk, dv, d_bias, d_slopes


def _d_query(q, k, v, d_out, base, delta, extras, settings, by_query, on_chip):
  (B, T, N, H), (S, K, h) = q.shape, v.shape[1:]
  plan, _ = plans(q.dtype, H, h)
  count, workers = -(-T // plan.rows), plan.warpgroups
  cut = lambda x, value: _padded(x, count * plan.rows, value).reshape(B, N, -1, ROWS)
  types = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  if extras.alibi_slopes is not None:
    types.append(jax.ShapeDtypeStruct((B, N, count * workers, ROWS), jnp.float32))
  outputs = hopper.launch(
    "flash_d_query",
    functools.partial(_query_kernel, Static(plan, settings, N // K, count, on_chip)),
    plan,
    grid={"head": N, "block": count, "batch": B},
    out_type=tuple(types),
    scratch=_QueryScratch(
      q_smem=matrix(ROWS, H, q.dtype)(workers),
      d_smem=matrix(ROWS, h, v.dtype)(workers),
      here=plgpu.Barrier(num_arrivals=2, num_barriers=workers),
      keys=Ring.of(workers, plan.stages[0], matrix(plan.others, H, k.dtype)),
      values=Ring.of(workers, plan.stages[1], matrix(plan.others, h, v.dtype)),
    ),
  )(
    _Inputs(
      q,
      k,
      v,
      d_out,
      cut(base, jnp.inf),
      cut(delta, 0.0),
      by_query,
      reads(extras, T, S, plan, load_positions=True),
    )  # fmt: skip
  )
  return outputs[0], outputs[1].sum((0, 2, 3)) if len(outputs) > 1 else None


def _d_key(q, k, v, d_out, base, delta, extras, settings, by_key, on_chip):
  (B, T, N, H), (S, K, h) = q.shape, v.shape[1:]
  _, plan = plans(q.dtype, H, h)
  count, workers, width = -(-S // plan.rows), plan.warpgroups, plan.others
  length = -(-T // width) * width
  ring = functools.partial(Ring.of, workers)
  inputs = _Inputs(
    q, k, v, d_out, _padded(base, length, jnp.inf), _padded(-delta, length, 0.0), by_key,
    reads(extras, T, S, plan, keys_first=True, load_positions=H + h >= 256),
  )  # fmt: skip
  shapes = {"dk": k, "dv": v}

  def run(*wants):
    static = Static(plan, settings, N // K, count, on_chip)
    return hopper.launch(
      "flash_" + "_".join(wants),
      functools.partial(_key_kernel, static, wants),
      plan,
      grid={"head": K, "block": count, "batch": B},
      out_type=tuple(jax.ShapeDtypeStruct(shapes[n].shape, shapes[n].dtype) for n in wants),
      scratch=_KeyScratch(
        k_smem=matrix(ROWS, H, k.dtype)(workers),
        v_smem=matrix(ROWS, h, v.dtype)(workers),
        here=plgpu.Barrier(num_arrivals=2, num_barriers=workers),
        queries=ring(plan.stages[0], matrix(width, H, q.dtype), numbers(width)),
        gradients=ring(plan.stages[1], matrix(width, h, v.dtype), numbers(width)),
      ),
    )(inputs)

  return run("dk", "dv") if H + h <= 256 else (*run("dk"), *run("dv"))


def visited(by_query: Visits) -> Array:
  """int32 `b n q_blocks k_blocks`: whether a block is visited."""
  order, _, active = by_query

  def row(order, active):
    named = (jnp.arange(len(order), dtype=jnp.int32) < active).astype(jnp.int32)
    order = jnp.where(named > 0, order, len(order))
    return jnp.zeros(order.shape, jnp.int32).at[order].set(named, mode="drop")

  for _ in range(3):
    row = jax.vmap(row)
  return row(order, active)


def _d_bias(q, k, v, d_out, base, delta, extras, settings, by_query, on_chip):
  (B, T, N, H), (S, K, h) = q.shape, v.shape[1:]
  plan = _bias_plan(q.dtype, H, h)
  workers, width = plan.warpgroups, plan.others
  rows, columns = -(-T // plan.rows), -(-S // width)
  cut = lambda x, value: _padded(x, rows * plan.rows, value).reshape(B, N, -1, ROWS)
  bias, whole = extras.bias, (B, N, rows, columns)
  own = [1 if size == 1 else n for size, n in zip(bias.shape, whole, strict=True)]
  lengths = tuple(n // mine for n, mine in zip(whole, own, strict=True))
  d_bias = hopper.launch(
    "flash_d_bias",
    functools.partial(_bias_kernel, Static(plan, settings, N // K, 0, on_chip), lengths),
    plan,
    grid={"head": own[1], "row": own[2], "column": own[0] * own[3]},
    out_type=jax.ShapeDtypeStruct((*own[:2], own[2] * plan.rows, own[3] * width), jnp.float32),
    scratch=_BiasScratch(
      queries=Ring.of(workers, 1, matrix(plan.rows, H, q.dtype), matrix(plan.rows, h, v.dtype)),
      keys=Ring.of(workers, 1, matrix(width, H, k.dtype), matrix(width, h, v.dtype)),
      out_smem=plgpu.SMEM((workers, ROWS, width), jnp.float32),
    ),
  )(
    _Inputs(
      q, k, v, d_out, cut(base, jnp.inf), cut(delta, 0.0), by_query, reads(extras, T, S, plan)
    ),
    visited(by_query),
  )
  summed = tuple(axis for axis in (2, 3) if bias.shape[axis] == 1)
  return d_bias.sum(summed, keepdims=True)[:, :, : bias.shape[2], : bias.shape[3]]
