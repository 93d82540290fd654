"""Hard-max attention on a TPU: which keys each query reads, by a scan of all scores.

    m[t] = max_s score[t, s]     count[t] = #{s: score[t, s] = m[t]}     last[t] = max such s

A grid of (batch row, query head, step), where the steps are the visits alone, in one list
(`flash_tpu_tiles.Steps`). A step is a block of 1024 queries by 1024 keys on the vector unit,
float32; the matrix unit does not round a product. Queries are rows of a register and keys its
lanes: each lane keeps the winners among its own keys, for 32 queries at a time in registers, and
nothing crosses lanes before the last step of a row of blocks, which turns them and joins the lanes.
A query's coordinates are spread over the lanes once, in the first step.

The floor is the vector unit: for 8 x 128 pairs of width 2 ten operations, of which a bundle holds
four. 32 queries by 1024 keys, 80 bundles then, are 101 on a v5e and 100 on a v6e without a mask,
124 with a causal one. No chip has run it yet.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash_tpu_tiles, hardmax
from pallas_kernels.flash import Visits
from pallas_kernels.flash_tpu_tiles import LANES, MAX_BLOCKS, MAX_STEPS, Steps, cdiv
from pallas_kernels.hardmax import Array, Winners
from pallas_kernels.linear_tiles import wide

BLOCK = (1024, 1024)
"""Queries and keys of a step."""

ROWS = 32
"""Queries whose winners are in registers."""


def unsupported(T: int, S: int, H: int) -> str | None:
  """Why this kernel refuses a call, or None."""
  blocks = [cdiv(length, size) for length, size in zip((T, S), BLOCK, strict=True)]
  if max(blocks) > MAX_BLOCKS or math.prod(blocks) > MAX_STEPS:
    return f"T={T} and S={S} are more blocks of scores than {MAX_STEPS}"
  return hardmax.too_wide(H)


class Call(NamedTuple):
  """What the kernel knows before it runs."""

  rule: Callable[[Array, Array], Array]
  steps: Steps
  group: int
  """Query heads per key head."""

  def spec(self, rows: int, field: str, group: int = 1) -> pl.BlockSpec:
    """How blocks of `B heads rows length` follow the steps: by the step's row, or its other."""

    def index(b, n, s, words_ref):
      word = self.steps.word(words_ref, b, n, s)
      return b, lax.div(n, jnp.int32(group)), 0, flash_tpu_tiles.field(word, field)

    return pl.BlockSpec((None, None, rows, BLOCK[field == "other"]), index)


class Scratch(NamedTuple):
  """What lives in vector memory from step to step, a lane each."""

  q: Any
  found: Winners


def _kernel(words_ref, q_ref, k_ref, *refs, call: Call):
  """One step, and what comes before the first and after the last of a row."""
  scratch = Scratch(refs[3], Winners(*refs[4:]))
  b, n, s = (pl.program_id(axis) for axis in range(3))
  word = call.steps.word(words_ref, b, n, s)
  flag = functools.partial(flash_tpu_tiles.flag, word)

  @pl.when(flag("first"))
  def start():
    for c in range(q_ref.shape[0]):
      scratch.q[c] = jnp.broadcast_to(q_ref[c : c + 1], (LANES, BLOCK[0])).T
    for ref, x in zip(scratch.found, (-jnp.inf, 0, -1), strict=True):
      ref[...] = jnp.full_like(ref, x)

  for kind in ("full", "mixed"):

    @pl.when(flag(kind))
    def visit(masked=kind == "mixed"):
      first_q = flash_tpu_tiles.field(word, "row") * BLOCK[0]
      first_k = flash_tpu_tiles.field(word, "other") * BLOCK[1]
      rule = call.rule if masked else None
      rows = functools.partial(_rows, k_ref, scratch, rule, first_q, first_k)
      lax.fori_loop(0, BLOCK[0] // ROWS, rows, None)

  @pl.when(flag("last"))
  def finish():
    lax.fori_loop(0, BLOCK[0] // LANES, functools.partial(_finish, scratch.found, refs[:3]), None)


def _rows(k_ref, scratch: Scratch, rule, first_q: Array, first_k: Array, r: Array, _) -> None:
  """`ROWS` queries of a block against all of its keys, a lane's winners among its own."""
  rows, shape = pl.ds(pl.multiple_of(r * ROWS, ROWS), ROWS), (ROWS, LANES)
  q = [scratch.q[c, rows] for c in range(k_ref.shape[0])]
  before = Winners(*(ref[rows] for ref in scratch.found))
  iota = functools.partial(lax.broadcasted_iota, jnp.int32, shape)
  q_idx, lane = iota(0) + (first_q + r * ROWS), iota(1) + first_k
  most, count, last = before.score, before.count, jnp.full(shape, -1, jnp.int32)
  for at in range(0, BLOCK[1], LANES):
    keys = (k_ref[c : c + 1, at : at + LANES] for c in range(len(q)))
    score = hardmax.score((x, jnp.broadcast_to(y, shape)) for x, y in zip(q, keys, strict=True))
    if rule is not None:
      score = jnp.where(rule(q_idx, lane + at), score, -jnp.inf)
    reaches = score >= most
    count = jnp.where(score > most, 1, jnp.where(reaches, count + 1, count))
    last, most = jnp.where(reaches, lane + at, last), jnp.maximum(most, score)
  # Blocks come in any order.
  last = jnp.where(most > before.score, last, jnp.maximum(before.last, last))
  for ref, x in zip(scratch.found, (most, count, last), strict=True):
    ref[rows] = x


def _finish(found: Winners, winners_refs, i: Array, _) -> None:
  """Of a register's lanes of queries, the winners among all lanes."""
  some = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
  lanes = Winners(*(ref[some].T for ref in found))
  score = lanes.score.max(0, keepdims=True)
  tied = lanes.score == score
  count = jnp.where(tied, lanes.count, 0).sum(0, keepdims=True)
  last = jnp.where(tied, lanes.last, -1).max(0, keepdims=True)
  for ref, x in zip(winners_refs, Winners(score, count, last).checked(), strict=True):
    ref[:, some] = x


def winners(q: Array, k: Array, rule: Callable[[Array, Array], Array], by_query: Visits) -> Winners:
  """See `pallas_kernels.hardmax`."""
  (B, N, H, T), K = q.shape, k.shape[1]
  q, k = wide(q, 3, BLOCK[0]), wide(k, 3, BLOCK[1])
  call = Call(rule, flash_tpu_tiles.steps(by_query), N // K)
  dtypes = (jnp.float32, jnp.int32, jnp.int32)
  lanes = lambda dtype: pltpu.VMEM((BLOCK[0], LANES), dtype)
  found = pl.pallas_call(
    functools.partial(_kernel, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, N, call.steps.length),
      in_specs=[call.spec(H, "row"), call.spec(H, "other", call.group)],
      out_specs=[call.spec(1, "row")] * 3,
      scratch_shapes=[pltpu.VMEM((H, BLOCK[0], LANES), jnp.float32), *map(lanes, dtypes)],
    ),
    out_shape=[jax.ShapeDtypeStruct((B, N, 1, q.shape[3]), dtype) for dtype in dtypes],
    compiler_params=flash_tpu_tiles.compiler_params("parallel", "parallel", "arbitrary"),
    name="hardmax_winners",
  )(call.steps.words, q, k)
  return Winners(*(x[:, :, 0, :T] for x in found))
