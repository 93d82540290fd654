"""Linear attention on a TPU: the backward pass, two walks over the chunks.

The first, along time, needs k, v and the decays alone and writes the state that enters every chunk,
in q's dtype, as products read it. The second goes from the last chunk to the first, carries the
gradient dS of the state that leaves, and makes every gradient of its chunk (D is d_out with its
rows scaled, ' is with the decays put in, as in `linear_tpu`):

    dP = D V^T + dweight        dQ' = D S^T + dweight z     dK' = V dS^T + dz
    dV = P^T D + K' dS          dfade = sum over h of S dS + z dz
    dS = fade dS + Q'^T D       dz = fade dz + sum of dweight Q'

dq, dk and the gradient of the decays follow from dQ', dK', dP and dfade: for decays per channel by
JAX's own derivative of how they are put in, taken while the kernel is traced; for decays per token
by hand, and the kernel leaves sums of W = dP P, of what was read and written, and of dfade, which
XLA adds up along time. Everything that may cancel is float32. Without a normalizer nothing is
computed of it. Up to eight heads a step, fewer as forward.

With decays per token what binds is the unit that moves lanes: transposes, sums along lanes, columns
made as wide as rows. So a column of sums becomes a row by a mask and a sum over rows.

The floor is memory: 365 KiB per chunk and head of 128 in bfloat16 (both walks, and the states there
and back), 553 with decays per channel. Cycles for that, and bundles of both walks per chunk and
head, as in `linear_tpu`:

|            | v5e, memory | v5e, bundles | v6e, memory | v6e, bundles |
|------------|-------------|--------------|-------------|--------------|
| token      | 685         | 674          | 399         | 596          |
| channel    | 1037        | 2146         | 604         | 1943         |
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import linear_tiles, linear_tpu_chunk, linear_tpu_tiles
from pallas_kernels.linear import Normalized, Settings, State
from pallas_kernels.linear_tiles import Array
from pallas_kernels.linear_tpu_chunk import Refs
from pallas_kernels.linear_tpu_tiles import (
  CHUNK,
  D_WEIGHT,
  LANES,
  NUMBERS,
  SCALE,
  Exponents,
  Faded,
  Shape,
  heads,
  product,
)

HEADS = 8
"""At most so many heads a step."""

_READ, _COLUMN, _WRITE, _TOTAL = range(4)
"""What the gradient of decays per token is made of, rows of a chunk."""


def backward(
  q: Array,
  k: Array,
  v: Array,
  g: Array | None,
  state: State,
  normalized: Normalized | None,
  d_out: Array,
  d_state: State,
  settings: Settings,
) -> tuple[Array, Array, Array, Array | None, State]:
  """(dq, dk, dv, dg, d_state)."""
  shape = linear_tpu_tiles.shape(q, k, v, g, HEADS)
  per_channel = g is not None and g.ndim == 4
  scale, weights = settings.scale, ()
  if normalized is not None:
    scale, weights = None, (normalized.inverse, -normalized.inverse * normalized.delta)
  kv, z = linear_tpu_tiles.entering(state)
  arrays = (q, k, v, d_out.astype(v.dtype))
  inputs, specs = linear_tpu_tiles.operands(shape, arrays, g, *weights, reverse=True)
  states = _states(shape, inputs, (kv, z), v.dtype)
  saved = [shape.chunk(*x.shape[3:], reverse=True) for x in states]
  ends = [shape.head(*x.shape[2:]) for x in (kv, z)]
  outputs, out_specs = _outputs(shape, (q, k, v), per_channel)
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
  dq, dk, dv, dg, d_kv, d_z = pl.pallas_call(
    functools.partial(_kernel, shape=shape, scale=scale),
    grid=shape.grid(),
    in_specs=[*specs, *saved, *ends],
    out_specs=[*out_specs, *ends],
    out_shape=[*outputs, struct(kv), struct(z)],
    compiler_params=linear_tpu_tiles.compiler_params(),
    name="linear_backward",
  )(*inputs, *states, *linear_tpu_tiles.entering(d_state))
  T = q.shape[1]
  dq, dk, dv = (
    linear_tiles.grouped(heads(x, T, like.shape[3], shape.N), like.shape[2]).astype(like.dtype)
    for x, like in ((dq, q), (dk, k), (dv, v))
  )
  dg = None if g is None else _d_decays(dg, g, T, shape)
  return dq, dk, dv, dg, linear_tpu_tiles.leaving(d_kv, d_z, state)


def _outputs(
  shape: Shape, arrays: tuple[Array, Array, Array], per_channel: bool
) -> tuple[list[jax.ShapeDtypeStruct], list[pl.BlockSpec]]:
  """dq, dk, dv of every head of the state, float32 where to be summed; dg, or its parts."""
  T, specs, found = shape.chunks * CHUNK, [], []
  for x, width, ratio in zip(arrays, (shape.M, shape.M, shape.h), shape.ratios, strict=True):
    dtype = x.dtype if ratio == 1 else jnp.float32
    found.append(jax.ShapeDtypeStruct((shape.B, T, shape.N * width), dtype))
    specs.append(shape.tokens(width, reverse=True))
  if per_channel:
    found.append(jax.ShapeDtypeStruct((shape.B, T, shape.N * shape.M), jnp.float32))
    specs.append(shape.tokens(shape.M, reverse=True))
  else:
    parts = (shape.B, shape.N, shape.chunks, NUMBERS, CHUNK)
    found.append(jax.ShapeDtypeStruct(parts, jnp.float32))
    specs.append(shape.chunk(NUMBERS, CHUNK, reverse=True))
  return found, specs


def _d_decays(dg: Array, g: Array, T: int, shape: Shape) -> Array:
  """The gradient of the decays, from what the kernel left of it."""
  if g.ndim == 4:
    return heads(dg, T, g.shape[3], shape.N)
  read, column, write, total = (dg[:, :, :, i] for i in (_READ, _COLUMN, _WRITE, _TOTAL))
  dg = linear_tiles.d_token(read, column, write, total[..., 0])
  dg = dg.reshape(*dg.shape[:2], -1)[..., :T].swapaxes(1, 2)
  return dg.sum((0, 1)) if g.ndim == 1 else dg


def _states(
  shape: Shape, inputs: list[Array], start: tuple[Array, Array], dtype: Any
) -> list[Array]:
  """The state that enters every chunk, transposed `B N chunks h M`, as products read it, and the
  normalizer `B N chunks 1 M`.
  """
  _, k, v, _, numbers, *g = inputs
  specs = [
    shape.tokens(shape.M, shape.ratios[1]),
    shape.tokens(shape.h, shape.ratios[2]),
    shape.chunk(NUMBERS, CHUNK),
    *[shape.tokens(shape.M) for _ in g],
  ]
  each = ((shape.h, shape.M), dtype), ((1, shape.M), jnp.float32)
  lead = (shape.B, shape.N, shape.chunks)
  return pl.pallas_call(
    functools.partial(_states_kernel, shape=shape),
    grid=shape.grid(),
    in_specs=[*specs, *[shape.head(*x.shape[2:]) for x in start]],
    out_specs=[shape.chunk(*size) for size, _ in each],
    out_shape=[jax.ShapeDtypeStruct((*lead, *size), dtype) for size, dtype in each],
    scratch_shapes=shape.scratch(),
    compiler_params=linear_tpu_tiles.compiler_params(),
    name="linear_states",
  )(k, v, numbers, *g, *start)


def _states_kernel(k_ref, v_ref, numbers_ref, *refs, shape: Shape):
  """Writes the states of a step's heads as they are before its chunk, and lets them go on."""
  *g, kv_start_ref, z_start_ref, kv_ref, z_ref, kv_vmem, z_vmem = refs

  @pl.when(pl.program_id(2) == 0)
  def start():
    kv_vmem[...] = kv_start_ref[...]
    z_vmem[...] = z_start_ref[...]

  given = Refs(None, k_ref, v_ref, numbers_ref, *g)
  before = [(kv_vmem[n], z_vmem[n]) for n in range(shape.step)]
  for n, (kv, z) in enumerate(before):
    kv_ref[n] = kv.astype(kv_ref.dtype)
    z_ref[n] = z
    k, v = linear_tpu_chunk.keys(given, n, shape), linear_tpu_chunk.values(given, n, shape)
    k, fade = linear_tpu_chunk.written(k, linear_tpu_chunk.decays(given, n, shape))
    kv_vmem[n] = kv * fade + product(v, k, (0, 0), v_ref.dtype)
    z_vmem[n] = z * fade + k.sum(0, keepdims=True)


class _States(NamedTuple):
  """What enters a chunk, and the gradient of what leaves it."""

  kv: Array
  z: Array
  d_kv: Array
  d_z: Array


class _Gradients(NamedTuple):
  """Of a chunk of one head, float32."""

  dq: Array
  dk: Array
  dv: Array
  dg: Array
  """`C M`, or its parts `NUMBERS C`."""
  kv: Array
  """Of the state that enters."""
  z: Array


def _kernel(*refs, shape: Shape, scale: float | None):
  """One chunk of a step's heads, from the last to the first. `scale` is of outputs, None where they
  are normalized.
  """
  *inputs, kv_ref, z_ref, d_kv_end_ref, d_z_end_ref = refs[:-6]
  *tokens_refs, d_kv_ref, d_z_ref = refs[-6:]
  q_ref, k_ref, v_ref, d_out_ref, numbers_ref, *g = inputs

  @pl.when(pl.program_id(2) == 0)
  def start():
    d_kv_ref[...] = d_kv_end_ref[...]
    d_z_ref[...] = d_z_end_ref[...]

  given = Refs(q_ref, k_ref, v_ref, numbers_ref, *g)
  found = []
  for n in range(shape.step):
    d_out = linear_tpu_tiles.columns(d_out_ref, n, 1, shape.h)
    after = _States(kv_ref[n], z_ref[n], d_kv_ref[n], d_z_ref[n])
    found.append(_chunk(given, n, d_out, after, shape=shape, scale=scale))
  for n, one in enumerate(found):
    for ref, x in zip(tokens_refs, one[:4], strict=True):
      if ref.ndim == 3:
        ref[n] = x
      else:
        width = x.shape[1]
        ref[:, n * width : (n + 1) * width] = x.astype(ref.dtype)
    d_kv_ref[n] = one.kv
    d_z_ref[n] = one.z


def _chunk(
  refs: Refs, n: int, d_out: Array, at: _States, *, shape: Shape, scale: float | None
) -> _Gradients:
  """Every gradient of a chunk."""
  v, dtype = linear_tpu_chunk.values(refs, n, shape), refs.q.dtype
  q, k = linear_tpu_chunk.queries(refs, n, shape), linear_tpu_chunk.keys(refs, n, shape)
  factor, d_weight = scale, None
  if factor is None:
    across = refs.numbers[n].T
    factor, d_weight = (across[:, i : i + 1] for i in (SCALE, D_WEIGHT))
  if scale != 1.0:
    d_out = (d_out.astype(jnp.float32) * factor).astype(dtype)
  d_chunk = Faded(
    q=product(d_out, at.kv, (1, 0), dtype),
    k=product(v, at.d_kv, (1, 0), dtype),
    pairs=product(d_out, v, (1, 1), dtype),
    fade=(at.kv.astype(jnp.float32) * at.d_kv).sum(0, keepdims=True),
  )
  d_z = at.d_z
  if d_weight is not None:
    more = Faded(d_weight * at.z, at.d_z, d_weight, at.z * at.d_z)
    d_chunk = Faded(*(x + y for x, y in zip(d_chunk, more, strict=True)))
  decays = linear_tpu_chunk.decays(refs, n, shape)
  if isinstance(decays, Exponents):
    chunk, dq, dk, dg = _by_token(q, k, decays, d_chunk, dtype)
  else:
    chunk, dq, dk, dg = _by_channel(q, k, decays, d_chunk, dtype)
  if d_weight is not None:
    d_z = d_z * chunk.fade + (chunk.q * d_weight).sum(0, keepdims=True)
  return _Gradients(
    dq,
    dk,
    product(chunk.pairs, d_out, (0, 0), dtype) + product(chunk.k, at.d_kv, (1, 1), dtype),
    dg,
    at.d_kv * chunk.fade + product(d_out, chunk.q, (0, 0), dtype),
    d_z,
  )


def _by_channel(
  q: Array, k: Array, g: Array, d_chunk: Faded, dtype: Any
) -> tuple[Faded, Array, Array, Array]:
  """(the chunk with its decays put in, dq, dk, dg)."""
  make = functools.partial(linear_tpu_chunk.faded, dtype=dtype)
  chunk, pull = jax.vjp(make, q, k, g)
  return chunk, *pull(d_chunk)


def _by_token(
  q: Array, k: Array, decays: Exponents, d_chunk: Faded, dtype: Any
) -> tuple[Faded, Array, Array, Array]:
  """The same, by hand; of the decays what `_parts` leaves."""
  between, *rest = (jnp.exp2(x) for x in decays)
  read, write, fade = (linear_tpu_tiles.along(x, q.shape[1]) for x in rest)
  scores, d_scores = product(q, k, (1, 1), dtype), d_chunk.pairs * between
  chunk = Faded(q * read, k * write, scores * between, fade)
  dq = d_chunk.q * read + product(d_scores, k, (1, 0), dtype)
  dk = d_chunk.k * write + product(d_scores, q, (0, 0), dtype)
  reads, writes, through = d_chunk.q * chunk.q, d_chunk.k * chunk.k, d_chunk.fade * fade
  return chunk, dq, dk, _parts(d_scores * scores, reads, writes, through)


def _parts(pairs: Array, reads: Array, writes: Array, fade: Array) -> Array:
  """Sums, `NUMBERS C`, whose running sums are the gradient of the decays: what every token reads,
  what is read of it inside of the chunk and behind it, and what passes through.
  """
  folded = lambda x: functools.reduce(jnp.add, jnp.split(x, x.shape[1] // LANES, axis=1))
  i, j = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
  across = lambda x: jnp.where(i == j, x.sum(1, keepdims=True), 0.0).sum(0, keepdims=True)
  at = lax.broadcasted_iota(jnp.int32, (NUMBERS, CHUNK), 0)
  rows = jnp.broadcast_to(folded(fade).sum(1, keepdims=True), at.shape)
  for row, x in {
    _READ: across(pairs + folded(reads)),
    _COLUMN: pairs.sum(0, keepdims=True),
    _WRITE: across(folded(writes)),
  }.items():
    rows = jnp.where(at == row, x, rows)
  return rows
