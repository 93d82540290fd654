"""Linear attention on a TPU.

A grid of (batch row, heads, chunk of 128 tokens in order); a step works on up to sixteen heads at
once, half as many for each of decays per channel, heads wider than 128 and float32, whose chains of
products and exponentials fill each other's waits. Heads that share one of q, k or v share its
block. Per chunk and head:

    P = (Q K^T) exp(decays between)         matrix unit, then vector unit; 0 above the diagonal
    out = P V + (Q exp(read)) S             matrix unit
    weight = rows of P + (Q exp(read)) . z  vector unit, only if normalized
    S = fade S + (K exp(write))^T V         float32, kept transposed, `h M`, so that a fading per
    z = fade z + sum of K exp(write)        channel is a row; it lives in the outgoing state's block

Decays per token come as two running floats and what follows a token (`linear_tpu_tiles`), so that
no digit is lost; decays per channel become P in `linear_tpu_channel`. None and per head are per
token. Operands of products are q's dtype, everything else float32. Arrays are read as `B T
heads*width`, width in whole columns of 128; a shorter width or last chunk is padded with zeros.

The floor is memory: q, k, v and the output once, 132 KiB per chunk and head of 128 in bfloat16, 196
with decays per channel. Cycles that a TPU's memory needs for that at its published bandwidth, and
bundles of the compiler's schedule, both per chunk and head, stalls not counted (`python -m
experiments.compile_check --kernels=linear`; (1, 8192, 96, 128)):

|            | v5e, memory | v5e, bundles | v6e, memory | v6e, bundles |
|------------|-------------|--------------|-------------|--------------|
| token      | 249         | 245          | 145         | 262          |
| channel    | 368         | 641          | 215         | 616          |

Backward: `linear_tpu_backward`. One token: `linear_tpu_step`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import linear_tpu_chunk, linear_tpu_tiles
from pallas_kernels.linear import Settings, State
from pallas_kernels.linear_tiles import Array
from pallas_kernels.linear_tpu_backward import backward
from pallas_kernels.linear_tpu_chunk import Refs
from pallas_kernels.linear_tpu_step import step
from pallas_kernels.linear_tpu_tiles import CHUNK, Shape, heads, product

__all__ = ["backward", "forward", "parts", "step", "unsupported"]

HEADS = 16
"""At most so many heads a step."""


def unsupported(q: Array, k: Array, v: Array, g: Array | None, settings: Settings) -> str | None:
  """Why these kernels refuse a call, or None."""
  del g, settings
  if q.dtype not in (jnp.float32, jnp.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
    return f"it multiplies float32 or bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
  width = max(q.shape[-1], v.shape[-1])
  return f"head_dim {width} is more than 256" if width > 256 else None


def parts(states: int, T: int, h: int) -> int:
  """A TensorCore walks along one head after the other: there is nobody to share with."""
  del states, T, h
  return 1


def forward(
  q: Array, k: Array, v: Array, g: Array | None, state: State, settings: Settings
) -> tuple[Array, Array | None, State]:
  """(out, weight, state)."""
  shape = linear_tpu_tiles.shape(q, k, v, g, HEADS)
  inputs, specs = linear_tpu_tiles.operands(shape, (q, k, v), g)
  ends = [shape.head(shape.h, shape.M), shape.head(1, shape.M)]
  kv, z = linear_tpu_tiles.entering(state)
  B, N, T, struct = shape.B, shape.N, q.shape[1], jax.ShapeDtypeStruct
  out, weight, kv, z = pl.pallas_call(
    functools.partial(_kernel, shape=shape, settings=settings),
    grid=shape.grid(),
    in_specs=[*specs, *ends],
    out_specs=[shape.tokens(shape.h), shape.chunk(1, CHUNK), *ends],
    out_shape=[
      struct((B, shape.chunks * CHUNK, N * shape.h), v.dtype),
      struct((B, N, shape.chunks, 1, CHUNK), jnp.float32),
      struct(kv.shape, jnp.float32),
      struct(z.shape, jnp.float32),
    ],
    compiler_params=linear_tpu_tiles.compiler_params(),
    name="linear_forward",
  )(*inputs, kv, z)
  weight = weight.reshape(B, N, -1)[..., :T] if settings.normalize else None
  return heads(out, T, v.shape[3], N), weight, linear_tpu_tiles.leaving(kv, z, state)


def _kernel(*refs, shape: Shape, settings: Settings):
  """One chunk of a step's heads. The outgoing state's block is where the state lives."""
  *inputs, kv_start_ref, z_start_ref, out_ref, weight_ref, kv_ref, z_ref = refs

  @pl.when(pl.program_id(2) == 0)
  def start():
    kv_ref[...] = kv_start_ref[...]
    z_ref[...] = z_start_ref[...]

  given = Refs(*inputs)
  done = [
    _chunk(given, n, kv_ref[n], z_ref[n], shape=shape, settings=settings) for n in range(shape.step)
  ]
  for n, (out, weight, kv, z) in enumerate(done):
    out_ref[:, n * shape.h : (n + 1) * shape.h] = out.astype(out_ref.dtype)
    weight_ref[n] = weight
    kv_ref[n] = kv
    z_ref[n] = z


def _chunk(
  refs: Refs, n: int, kv: Array, z: Array, *, shape: Shape, settings: Settings
) -> tuple[Array, Array, Array, Array]:
  """(out, weight as a row, kv, z) of one head."""
  v, dtype = linear_tpu_chunk.values(refs, n, shape), refs.q.dtype
  q, k = linear_tpu_chunk.queries(refs, n, shape), linear_tpu_chunk.keys(refs, n, shape)
  chunk = linear_tpu_chunk.faded(q, k, linear_tpu_chunk.decays(refs, n, shape), dtype)
  out = product(chunk.pairs, v, (1, 0), dtype) + product(chunk.q, kv, (1, 1), dtype)
  row = jnp.zeros((1, CHUNK), jnp.float32)
  if settings.normalize:
    weight = chunk.pairs.sum(1, keepdims=True) + (chunk.q * z).sum(1, keepdims=True)
    out = jnp.where(weight == 0, 0.0, out / jnp.where(weight == 0, 1.0, weight))
    row = jnp.broadcast_to(weight, (CHUNK, CHUNK)).T[:1]
    z = z * chunk.fade + chunk.k.sum(0, keepdims=True)
  else:
    out = out * settings.scale
  return out, row, kv * chunk.fade + product(v, chunk.k, (0, 0), dtype), z
