"""Hard-max attention on Hopper GPUs (sm_90a): which keys each query reads, by a scan of all scores.

One warpgroup has 64 queries of one head and visits the key blocks that the mask leaves, 64 keys at
a time: first the full ones without a mask, then the mixed ones, whose scores the rule masks. A
score is a product and a sum per coordinate, float32, outside of the tensor cores, which do not
round so. A tile's maxima, counts and last keys are joined across the four threads of a row, then
with what was found before.

Everything is in registers, and keys come by ordinary loads: all blocks of a head read the same
ones, 8 bytes for 64 pairs of width 2, so the caches have them, and the other warpgroups of the
multiprocessor (four, by 128 registers) work meanwhile. The floor is what instructions there are: a
tile of width 2 without a mask is 348 for the 32 pairs of a thread (64 FFMA, 32 FADD, 38 FMNMX, 36
FSETP; the rest counts and finds the last), no barrier among them. No chip has run it yet.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hardmax, hopper
from pallas_kernels.flash import Visits
from pallas_kernels.hardmax import Array, Winners
from pallas_kernels.hopper import COLUMN, ROW, ROWS, TILE, along, pick
from pallas_kernels.linear_tiles import wide

TILE_SHAPE = (ROWS, 64)
"""Queries and keys of a tile."""

BLOCK = (ROWS, 256)
"""In which visits are counted: several tiles, or their list would be long."""


def unsupported(T: int, S: int, H: int) -> str | None:
  """Why this kernel refuses a call, or None."""
  del T, S
  return hardmax.too_wide(H)


class Inputs(NamedTuple):
  """What the kernel reads, whole tiles."""

  q: Any
  """float32 `B N H T`."""
  k: Any
  """float32 `B K H S`."""
  visits: Visits


def _kernel(inputs: Inputs, *winners_gmem, scratch, rule: Callable[[Array, Array], Array]):
  del scratch
  b, n, i = (lax.axis_index(name) for name in ("batch", "head", "block"))
  visits = inputs.visits
  i = visits.full.shape[2] - 1 - i  # the last block first: under a causal mask it is the longest
  where, rows = pick(visits.full, b, n, i), pl.ds(i * ROWS, ROWS)
  load = functools.partial(plgpu.load, optimized=False)
  coordinates = range(inputs.q.shape[2])
  q = [along(load(inputs.q.at[b, n, c, rows], layout=ROW), 0, TILE_SHAPE) for c in coordinates]
  key_head = lax.div(n, inputs.q.shape[1] // inputs.k.shape[1])
  iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, TILE_SHAPE, layout=TILE)
  q_idx, column = iota(dimension=0) + i * ROWS, iota(dimension=1)

  def tile(first, found, masked):
    keys = (inputs.k.at[b, key_head, c, pl.ds(first, TILE_SHAPE[1])] for c in coordinates)
    k = [along(load(x, layout=COLUMN), 1, TILE_SHAPE) for x in keys]
    score = hardmax.score(zip(q, k, strict=True))
    if masked:
      score = jnp.where(rule(q_idx, column + first), score, -jnp.inf)
    most = score.max(axis=1)
    tied = score == along(most, 0, TILE_SHAPE)
    count = jnp.where(tied, 1, 0).sum(axis=1)
    last = jnp.where(tied, column, -1).max(axis=1) + first
    return _joined(found, Winners(most, count, last))

  def visit(t, found, masked):
    first = visits.order[(*where, t)] * BLOCK[1]
    part = lambda at, found: tile(first + at * TILE_SHAPE[1], found, masked)
    return lax.fori_loop(0, BLOCK[1] // TILE_SHAPE[1], part, found)

  every = lambda x: plgpu.layout_cast(jnp.broadcast_to(x, (ROWS,)), ROW)
  found = Winners(every(jnp.float32(-jnp.inf)), every(jnp.int32(0)), every(jnp.int32(-1)))
  full, active = visits.full[where], visits.active[where]
  found = lax.fori_loop(0, full, functools.partial(visit, masked=False), found)
  found = lax.fori_loop(full, active, functools.partial(visit, masked=True), found)
  for x, gmem in zip(found.checked(), winners_gmem, strict=True):
    gmem.at[b, n, rows][...] = x


def _joined(a: Winners, b: Winners) -> Winners:
  """Of two sets of keys that have none in common."""
  score = jnp.maximum(a.score, b.score)
  of_a, of_b = a.score == score, b.score == score
  count = jnp.where(of_a, a.count, 0) + jnp.where(of_b, b.count, 0)
  last = jnp.where(of_a, a.last, -1)
  return Winners(score, count, jnp.where(of_b, jnp.maximum(last, b.last), last))


def winners(q: Array, k: Array, rule: Callable[[Array, Array], Array], by_query: Visits) -> Winners:
  """See `pallas_kernels.hardmax`."""
  B, N, _, T = q.shape
  q, k = wide(q, 3, BLOCK[0]), wide(k, 3, BLOCK[1])
  shape = functools.partial(jax.ShapeDtypeStruct, (B, N, q.shape[3]))
  found = hopper.launch_alone(
    "hardmax_winners",
    functools.partial(_kernel, rule=rule),
    {"head": N, "block": q.shape[3] // BLOCK[0], "batch": B},
    (shape(jnp.float32), shape(jnp.int32), shape(jnp.int32)),
  )(Inputs(q, k, by_query))
  return Winners(*(x[..., :T] for x in found))
