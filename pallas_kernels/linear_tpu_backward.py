"""Linear attention on a TPU: the backward pass, two walks over the chunks.

The first, along time, needs k, v and the decays alone and writes the state that enters every chunk,
in q's dtype, as products read it. The second goes from the last chunk to the first, carries the
gradient dS of the state that leaves, and makes every gradient of its chunk (D is d_out with its
rows scaled, ' is with the decays put in, as in `linear_tpu`):

    dP = D V^T + dweight        dQ' = D S^T + dweight z     dK' = V dS^T + dz
    dV = P^T D + K' dS          dfade = sum over h of S dS + z dz
    dS = fade dS + Q'^T D       dz = fade dz + sum of dweight Q'

dq, dk and the gradient of the decays follow from dQ', dK', dP and dfade by JAX's own derivative of
how decays are put in, taken while the kernel is traced. For decays per token the kernel leaves sums
of W = dP P over rows and columns, of what was read and written, and of dfade; XLA adds them up
along time. Everything that may cancel is float32. Up to four heads a step, two with decays per
channel or wider heads.

The floor is memory: 365 KiB per chunk and head of 128 in bfloat16 (both walks, and the states there
and back), 553 with decays per channel. Cycles for that, and bundles of both walks per chunk and
head, as in `linear_tpu`:

|            | v5e, memory | v5e, bundles | v6e, memory | v6e, bundles |
|------------|-------------|--------------|-------------|--------------|
| token      | 685         | 1099         | 399         | 947          |
| channel    | 1037        | 2347         | 604         | 2182         |
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

HEADS = 4
"""At most so many heads a step."""

_ROW, _READ, _COLUMN, _WRITE, _TOTAL = range(5)
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
  scale, d_weight = settings.scale, 0.0
  if normalized is not None:
    scale, d_weight = normalized.inverse, -normalized.inverse * normalized.delta
  kv, z = linear_tpu_tiles.entering(state)
  arrays = (q, k, v, d_out.astype(v.dtype))
  inputs, specs = linear_tpu_tiles.operands(shape, arrays, g, scale, d_weight, reverse=True)
  states = _states(shape, inputs, (kv, z), v.dtype)
  saved = [shape.chunk(*x.shape[3:], reverse=True) for x in states]
  ends = [shape.head(*x.shape[2:]) for x in (kv, z)]
  outputs, out_specs = _outputs(shape, (q, k, v), per_channel)
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
  dq, dk, dv, dg, d_kv, d_z = pl.pallas_call(
    functools.partial(_kernel, shape=shape),
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
  dg = linear_tiles.d_token(dg[:, :, :, :_TOTAL], dg[:, :, :, _TOTAL, 0])
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


def _kernel(*refs, shape: Shape):
  """One chunk of a step's heads, from the last to the first."""
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
    found.append(_chunk(given, n, d_out, after, shape=shape))
  for n, one in enumerate(found):
    for ref, x in zip(tokens_refs, one[:4], strict=True):
      if ref.ndim == 3:
        ref[n] = x
      else:
        width = x.shape[1]
        ref[:, n * width : (n + 1) * width] = x.astype(ref.dtype)
    d_kv_ref[n] = one.kv
    d_z_ref[n] = one.z


def _chunk(refs: Refs, n: int, d_out: Array, at: _States, *, shape: Shape) -> _Gradients:
  """Every gradient of a chunk."""
  v, dtype = linear_tpu_chunk.values(refs, n, shape), refs.q.dtype
  q, k = linear_tpu_chunk.queries(refs, n, shape), linear_tpu_chunk.keys(refs, n, shape)
  decays = linear_tpu_chunk.decays(refs, n, shape)
  make = functools.partial(linear_tpu_chunk.faded, dtype=dtype)
  chunk, pull = jax.vjp(make, q, k, decays)
  across = refs.numbers[n].T
  d_weight = across[:, D_WEIGHT : D_WEIGHT + 1]
  d_out = (d_out.astype(jnp.float32) * across[:, SCALE : SCALE + 1]).astype(dtype)
  d_chunk = Faded(
    q=product(d_out, at.kv, (1, 0), dtype) + d_weight * at.z,
    k=product(v, at.d_kv, (1, 0), dtype) + at.d_z,
    pairs=product(d_out, v, (1, 1), dtype) + d_weight,
    fade=(at.kv.astype(jnp.float32) * at.d_kv).sum(0, keepdims=True) + at.z * at.d_z,
  )
  dq, dk, dg = pull(d_chunk)
  return _Gradients(
    dq,
    dk,
    product(chunk.pairs, d_out, (0, 0), dtype) + product(chunk.k, at.d_kv, (1, 1), dtype),
    _parts(dg) if isinstance(dg, Exponents) else dg,
    at.d_kv * chunk.fade + product(d_out, chunk.q, (0, 0), dtype),
    at.d_z * chunk.fade + (chunk.q * d_weight).sum(0, keepdims=True),
  )


def _parts(dg: Exponents) -> Array:
  """Sums of the gradients of the exponents, `NUMBERS C`, whose running sums are the gradient of the
  decays. Decays are in base 2: the gradient of a natural one is 1 / ln 2 as much.
  """
  lane = lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 1)
  tile = jnp.zeros((CHUNK, LANES), jnp.float32)
  columns = {_ROW: dg.between.sum(1, keepdims=True), _READ: dg.read, _WRITE: dg.write}
  for at, x in columns.items():
    tile = jnp.where(lane == at, x, tile)
  rows = tile.T[:NUMBERS]
  at = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
  rows = jnp.where(at == _COLUMN, dg.between.sum(0, keepdims=True), rows)
  return jnp.where(at == _TOTAL, dg.total, rows) * linear_tiles.LOG2_E
