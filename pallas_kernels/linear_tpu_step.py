"""Linear attention on a TPU: one token.

A grid of (batch row, up to eight heads), all in float32 on the vector unit: S = exp(g) S + k v^T
and q S, a sum over rows. A column is needed of k, q and exp(g), so the heads' rows are turned
at once. The state is updated where it lies. The floor is memory, the state there and back: 64 KiB
a head of 128 x 128 each way, 0.16 us on a TPU v5e.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import Settings, State
from pallas_kernels.linear_tiles import Array, wide
from pallas_kernels.linear_tpu_tiles import LANES

_HEADS = 8
"""At most, of a step of the grid: the rows of a register."""


def heads_a_step(N: int) -> int:
  """Of N heads, so many are worked on at once."""
  return max(n for n in range(1, _HEADS + 1) if N % n == 0)


def step(
  q: Array, k: Array, v: Array, g: Array | None, state: State, settings: Settings
) -> tuple[Array, State]:
  """(out `B N h`, state) after one token."""
  B, N, M, h = state.kv.shape
  g = jnp.zeros((1, 1, 1)) if g is None else g if g.ndim == 3 else g[..., None]
  fade = jnp.broadcast_to(jnp.exp(g), (B, N, M))
  z = jnp.zeros((B, N, M), jnp.float32) if state.z is None else state.z
  per = heads_a_step(N)

  def rows_of(x):
    x = jnp.repeat(x.astype(jnp.float32), N // x.shape[1], 1).reshape(B, N // per, per, -1)
    return wide(wide(x, 2, _HEADS), 3, LANES)

  rows = [rows_of(x) for x in (q, k, v, fade, z)]
  row = [pl.BlockSpec((None, None, *x.shape[2:]), lambda b, n: (b, n, 0, 0)) for x in rows]
  matrix = pl.BlockSpec((None, per, M, h), lambda b, n: (b, n, 0, 0))
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
  out, kv, z = pl.pallas_call(
    functools.partial(_kernel, settings=settings, heads=per),
    grid=(B, N // per),
    in_specs=[*row, matrix],
    out_specs=[row[2], matrix, row[4]],
    out_shape=[struct(rows[2]), struct(state.kv), struct(rows[4])],
    input_output_aliases={4: 2, 5: 1},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    name="linear_step",
  )(*rows, state.kv)
  heads = lambda x, width: x[:, :, :per, :width].reshape(B, N, width)
  return heads(out, h).astype(v.dtype), State(kv, heads(z, M) if settings.normalize else None)


def _kernel(
  q_ref, k_ref, v_ref, fade_ref, z_ref, kv_ref, out_ref, kv_out_ref, z_out_ref, *, settings, heads
):
  """A token of eight heads; where there are fewer, the rest are zeros."""
  M, h = kv_ref.shape[1:]
  z = z_ref[...] * fade_ref[...] + k_ref[...]
  z_out_ref[...] = z
  scale = settings.scale
  if settings.normalize:
    weight = (q_ref[...] * z).sum(1, keepdims=True)
    scale = jnp.where(weight == 0, 0.0, 1 / jnp.where(weight == 0, 1.0, weight))
  q, k, fade = ((ref[...]).T[:M] for ref in (q_ref, k_ref, fade_ref))
  out = jnp.zeros(out_ref.shape, jnp.float32)
  head = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
  for n in range(heads):
    column = slice(n, n + 1)
    kv = kv_ref[n] * fade[:, column] + k[:, column] * v_ref[column, :h]
    kv_out_ref[n] = kv
    row = (kv * q[:, column]).sum(0, keepdims=True)
    row = wide(row, 1, LANES)
    out = jnp.where(head == n, row, out)
  out_ref[...] = out * scale
