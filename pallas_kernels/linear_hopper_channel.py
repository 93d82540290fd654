"""Decays per channel inside a chunk, on Hopper GPUs (sm_90a): what makes them a walk's operands.

    P_ij = sum_m q_im k_jm exp(g_{j+1,m} + ... + g_im)     Q' = q exp(g_1 + ... + g_i)
                                                           K' = k exp(g_{i+1} + ... + g_64)

A chunk is halved and halved again. Where i lies in the right half of a block and j in the left one,
what lies between is the sum up to i in i's half, and the rest of j's half after j: sums of numbers
of one sign, no differences. So a level has one tile of exponents e = D g, D of zeros and ones, one
tile X = exp(e) (q in right halves, k in left ones), and X X^T holds all of its pairs; six levels
and the diagonal make P. D g is a matrix product: g comes as two bfloat16 (2^-17 of an exponent), or
three where q and k are float32, which are three themselves (`hopper_parts`).

Backward, with Y = dP + dP^T below the diagonal and A = Y where the level's pairs are: dX = A X,
dq = dk = exp(e) dX, and de = X dX goes to dg by D^T, again in as many bfloat16. No term is ever
subtracted from another that holds it.

One warpgroup per chunk and head, without a feeder; several blocks share a multiprocessor. The
backward kernel takes 64 channels at a time, for channels meet in P alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, hopper_parts
from pallas_kernels.hopper import COLUMN, ROW, ROWS, TILE, along, matrix, zeros
from pallas_kernels.hopper_parts import Parts
from pallas_kernels.linear_hopper_walk import head
from pallas_kernels.linear_tiles import CHUNK, LOG2_E, Array

CHANNELS = 64
"""That are worked on at once."""

LEVELS = 6
"""Halvings of a chunk."""


def _levels() -> Array:
  """`LEVELS` from memory: see `hopper.unhoisted`."""
  return jnp.full((1,), LEVELS, jnp.int32)


def between(level: Array | int, places, *, transposed: bool = False) -> Array:
  """D of a level whose halves have 2^level tokens: in a right half the tokens up to this one, in a
  left half those after it. At `LEVELS` the half is the chunk, as if it were a left one.
  """
  i, s = hopper.positions(places)
  i, s = (s, i) if transposed else (i, s)
  half = lax.shift_right_logical
  inside = jnp.where((half(i, level) & 1) == 1, i - s, s - i - 1)
  return jnp.where(half(i, level) == half(s, level), inside, -1) >= 0


def up_to(places, *, transposed: bool = False) -> Array:
  """The D of what a token reads of the state that enters the chunk."""
  i, s = hopper.positions(places)
  return s >= i if transposed else s <= i


def after(places, *, transposed: bool = False) -> Array:
  """The D of what a token writes to the state that leaves the chunk."""
  return between(LEVELS, places, transposed=transposed)


def crossing(level: Array | int, places) -> Array:
  """Which pairs, in either order, lie in two halves of one block."""
  i, j = hopper.positions(places)
  half = lax.shift_right_logical
  return (half(i, level) ^ half(j, level)) == 1


def split(x: Array, smem) -> None:
  """A float32 tile as the sum of two or three in shared memory."""
  hopper_parts.store(x, [smem.at[i] for i in range(smem.shape[0])])
  plgpu.commit_smem()


def weigh(d: Array, smem, step: Array, start: Array | None = None, *, on_chip: bool) -> Array:
  """d x, of zeros and ones and what `split` left, added to `start`."""
  ones = jnp.where(d, 1.0, 0.0).astype(jnp.bfloat16)
  total = zeros(CHUNK, CHANNELS) if start is None else start
  for i in range(smem.shape[0]):
    part_smem = smem.at[hopper.unhoisted(jnp.int32(i), step)]
    (total,) = hopper.add_products((total, ones, part_smem), on_chip=on_chip)
  return total


def _right(level: Array | int, places) -> Array:
  i, _ = hopper.positions(places)
  return (lax.shift_right_logical(i, level) & 1) == 1


class Faded(NamedTuple):
  """The operands of a walk."""

  q: Parts
  k: Parts
  """`B T N M`."""
  pairs: Parts
  """P, `B N C CHUNK CHUNK`, its rows times `scale`."""


class _FadeScratch(NamedTuple):
  """Shared memory of the forward kernel."""

  q_smem: Parts
  k_smem: Parts
  here: Any
  g_smem: Any
  positions_smem: Any
  x_smem: Parts
  out_smem: Parts


def _fade_kernel(on_chip: bool, q, k, g, scale, levels, faded_q, faded_k, pairs_gmem, *, scratch):
  b, n, c = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
  rows, parts, load = pl.ds(c * CHUNK, CHUNK), g.shape[3] // CHANNELS, hopper_parts.load
  places = scratch.positions_smem
  hopper.write_positions(places)
  copied = zip((*q, *k), (*scratch.q_smem, *scratch.k_smem), strict=True)
  for x, smem in copied:
    for m in range(parts):
      source = x.at[b, rows, head(x, n, g.shape[2]), pl.ds(m * CHANNELS, CHANNELS)]
      plgpu.copy_gmem_to_smem(source, smem.at[m], scratch.here)
  plgpu.barrier_wait(scratch.here)
  multiply = functools.partial(hopper_parts.product, on_chip=on_chip)

  def store(x, gmem):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem = hopper_parts.at(scratch.out_smem, 0)
    hopper_parts.store(x, out_smem)
    plgpu.commit_smem()
    for one_smem, one_gmem in zip(out_smem, gmem, strict=True):
      plgpu.copy_smem_to_gmem(one_smem, one_gmem)

  def part(m, pairs):
    columns = pl.ds(m * CHANNELS, CHANNELS)
    q_smem, k_smem = (hopper_parts.at(x, m) for x in (scratch.q_smem, scratch.k_smem))
    log = plgpu.load(g.at[b, rows, n, columns], layout=TILE, optimized=False) * LOG2_E
    split(log, scratch.g_smem)
    i, j = hopper.positions(places)
    pairs = pairs + jnp.where(i == j, multiply(q_smem, k_smem), 0.0)

    def one(level, pairs):
      decay = jnp.exp2(weigh(between(level, places), scratch.g_smem, level, on_chip=on_chip))
      x = decay * jnp.where(_right(level, places), load(q_smem), load(k_smem))
      x_smem = hopper_parts.at(scratch.x_smem, hopper.unhoisted(jnp.int32(0), level))
      hopper_parts.store(x, x_smem)
      plgpu.commit_smem()
      found = multiply(x_smem, x_smem)
      return pairs + jnp.where(crossing(level, places), jnp.where(j < i, found, 0.0), 0.0)

    pairs = lax.fori_loop(0, levels[0], one, pairs)
    for d, smem, out in (
      (up_to, q_smem, faded_q),
      (after, k_smem, faded_k),
    ):
      decay = jnp.exp2(weigh(d(places), scratch.g_smem, m, on_chip=on_chip))
      store(decay * load(smem), hopper_parts.at(out, b, rows, n, columns))
    return pairs

  pairs = lax.fori_loop(0, parts, part, zeros(CHUNK, CHUNK))
  factor = plgpu.load(scale.at[b, n, c], layout=ROW, optimized=False)
  store(pairs * along(factor, 0, pairs.shape), hopper_parts.at(pairs_gmem, b, n, c))
  plgpu.wait_smem_to_gmem(0)


def fade(q: Parts, k: Parts, g: Array, scale: Array, *, on_chip: bool) -> Faded:
  """The operands of a walk; g is `B T' N M` with T' whole chunks, scale `B N C CHUNK`."""
  (B, T), N, M, half, many = q[0].shape[:2], g.shape[2], q[0].shape[3], q[0].dtype, len(q)
  chunks = g.shape[1] // CHUNK
  tile = matrix(CHUNK, CHANNELS, half)
  array = lambda *shape: (jax.ShapeDtypeStruct(shape, half),) * many
  parts = M // CHANNELS
  return Faded(
    *hopper.launch_alone(
      "linear_fade",
      functools.partial(_fade_kernel, on_chip),
      {"head": N, "batch": B, "chunk": chunks},
      (array(B, T, N, M), array(B, T, N, M), array(B, N, chunks, CHUNK, CHUNK)),
      _FadeScratch(
        q_smem=(tile(parts),) * many,
        k_smem=(tile(parts),) * many,
        here=plgpu.Barrier(num_arrivals=2 * parts * many),
        g_smem=matrix(CHUNK, CHANNELS, jnp.bfloat16)(max(2, many)),
        positions_smem=plgpu.SMEM((CHUNK,), jnp.int32),
        x_smem=(tile(1),) * many,
        out_smem=(tile(1),) * many,
      ),
    )(q, k, g, scale, _levels())
  )


class Unfade(NamedTuple):
  """What the backward kernel reads."""

  q: Any
  k: Any
  d_faded_q: Any
  d_faded_k: Any
  d_pairs: Any
  d_pairs_t: Any
  """dP on and below the diagonal, dP^T above it."""
  g: Any
  d_fade: Any
  """`B N C M`: what every decay of the chunk adds to the gradient of the state."""


class _UnfadeScratch(NamedTuple):
  """Shared memory of the backward kernel."""

  tiles: Any
  here: Any
  g_smem: Any
  d_smem: Any
  positions_smem: Any
  x_smem: Parts
  out_smem: Any


def _unfade_kernel(on_chip: bool, given: Unfade, levels, dq_gmem, dk_gmem, dg_gmem, *, scratch):
  b, n, c = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
  rows, columns = pl.ds(c * CHUNK, CHUNK), pl.ds(lax.axis_index("part") * CHANNELS, CHANNELS)
  places = scratch.positions_smem
  hopper.write_positions(places)
  sources = [
    x.at[b, rows, head(x, n, given.g.shape[2]), columns]
    for x in (given.q, given.k, given.d_faded_q, given.d_faded_k)
  ]
  sources += [given.d_pairs.at[b, n, c], given.d_pairs_t.at[b, n, c]]
  for i, source in enumerate(sources):
    plgpu.copy_gmem_to_smem(source, scratch.tiles.at[i], scratch.here)
  log = plgpu.load(given.g.at[b, rows, n, columns], layout=TILE, optimized=False) * LOG2_E
  split(log, scratch.g_smem)
  plgpu.barrier_wait(scratch.here)
  q_smem, k_smem, faded_q, faded_k, low, high = (scratch.tiles.at[i] for i in range(6))
  load = lambda smem: hopper_parts.load((smem,))
  i, j = hopper.positions(places)
  once = lambda d, step, total: weigh(d, scratch.d_smem, step, total, on_chip=on_chip)

  def whole(d, smem, faded, dg):
    """(the gradient of q or k, dg) through what enters or leaves the chunk."""
    dx = jnp.exp2(weigh(d(places), scratch.g_smem, c, on_chip=on_chip)) * load(faded)
    split(dx * load(smem), scratch.d_smem)
    return dx, once(d(places, transposed=True), c, dg)

  d_fade = plgpu.load(given.d_fade.at[b, n, c, columns], layout=COLUMN, optimized=False)
  dg = along(d_fade, 1, (CHUNK, CHANNELS))
  dq, dg = whole(up_to, q_smem, faded_q, dg)
  dk, dg = whole(after, k_smem, faded_k, dg)
  diagonal = along(jnp.where(i == j, load(low), 0.0).sum(axis=1), 0, (CHUNK, CHANNELS))
  dq, dk = dq + diagonal * load(k_smem), dk + diagonal * load(q_smem)

  def one(level, carry):
    dq, dk, dg = carry
    decay = jnp.exp2(weigh(between(level, places), scratch.g_smem, level, on_chip=on_chip))
    right = _right(level, places)
    x = decay * jnp.where(right, load(q_smem), load(k_smem))
    x_smem = hopper_parts.at(scratch.x_smem, hopper.unhoisted(jnp.int32(0), level))
    hopper_parts.store(x, x_smem)
    plgpu.commit_smem()
    d_pairs = jnp.where(crossing(level, places), load(low) + load(high), 0.0)
    if len(x_smem) > 1:  # whose three left operands need the registers
      scratch.out_smem[...] = decay
      plgpu.commit_smem()
    dx = hopper_parts.add(zeros(CHUNK, CHANNELS), d_pairs, x_smem, on_chip=on_chip)
    split(hopper_parts.load(x_smem) * dx, scratch.d_smem)
    if len(x_smem) > 1:
      decay = plgpu.load(scratch.out_smem, layout=TILE)
    dx = decay * dx
    dg = once(between(level, places, transposed=True), level, dg)
    return dq + jnp.where(right, dx, 0.0), dk + jnp.where(right, 0.0, dx), dg

  dq, dk, dg = lax.fori_loop(0, levels[0], one, (dq, dk, dg))
  out_smem = scratch.x_smem[0].at[0] if len(scratch.x_smem) == 1 else scratch.out_smem
  for value, gmem in ((dq, dq_gmem), (dk, dk_gmem)):
    hopper.store(value.astype(q_smem.dtype), out_smem, gmem.at[b, rows, n, columns])
  hopper.store(dg, scratch.out_smem, dg_gmem.at[b, rows, n, columns])


def unfade(given: Unfade, *, on_chip: bool) -> tuple[Array, Array, Array]:
  """(dq, dk, dg) `B T N M` of every head of the state, dg float32 and of whole chunks."""
  (B, T, N, M), dtype = given.d_faded_q.shape, given.q.dtype
  like = jax.ShapeDtypeStruct((B, T, N, M), dtype)
  many, tile = hopper_parts.count(dtype), matrix(CHUNK, CHANNELS, jnp.bfloat16)
  return hopper.launch_alone(
    "linear_unfade",
    functools.partial(_unfade_kernel, on_chip),
    {"part": M // CHANNELS, "head": N, "batch": B, "chunk": given.g.shape[1] // CHUNK},
    (like, like, jax.ShapeDtypeStruct(given.g.shape, jnp.float32)),
    _UnfadeScratch(
      tiles=matrix(CHUNK, CHANNELS, dtype)(6),
      here=plgpu.Barrier(num_arrivals=6),
      g_smem=tile(max(2, many)),
      d_smem=tile(max(2, many)),
      positions_smem=plgpu.SMEM((CHUNK,), jnp.int32),
      x_smem=(tile(1),) * many,
      out_smem=plgpu.SMEM((ROWS, CHANNELS), jnp.float32),
    ),
  )(given, _levels())
