"""Linear attention on Hopper GPUs (sm_90a): what it supports, forward, backward and one token.

    forward    [linear_fade]   linear_forward      the state along the sequence, and its reads
    backward   [linear_fade]   linear_states       the state that enters every chunk, from k and v
                               linear_states       backward: the gradient that leaves, from q and dO
                               linear_gradients    every chunk by itself
               [linear_unfade]
    step       linear_step

The kernels in brackets run with decays per channel only. Chunks have 64 tokens; widths are padded
to multiples of 64, and T to one of 8. No kernel adds atomically; gradients of shared heads are made
per head of the state and summed. Decays per head are decays per token here, and no decay is a decay
of 0. What decays per token add up to, and the normalizer z of every chunk (float32, a scan over
chunks in log steps), is made outside by XLA: 1/64 to 1/20 of the bytes. Backward writes the states
and their gradients in bfloat16, 4 M h / 64 bytes per token and head. A walk is one block of threads
per head and 64 or 128 columns of its state; where those are fewer than the chip's multiprocessors,
`parts` asks for time cut into several walks, and XLA makes the states that enter them.

float32 is three bfloat16 and every product six (`hopper_parts`): XLA cuts q, k, v and dO, states
and their gradients are written in parts, results are float32. Three parts of a chunk of wider keys
and queries than 128, and of their state, do not fit shared memory, so those are refused.

Floor: bytes. At M = h = 128, per token, head and channel, floor and what is moved, and the times of
both at 4.8 TB/s for B=1, T=8192, N=96:

    token, forward      8 and  8 bytes    0.17 and 0.17 ms
    token, backward    14 and 38          0.29 and 0.80
    channel, forward   12 and 26          0.25 and 0.55
    channel, backward  22 and 82          0.46 and 1.72
    float32, token, forward    16 and  52 bytes    0.34 and 1.09 ms
    float32, token, backward   28 and 148          0.59 and 3.10

ptxas at the shapes of fla's registry: no product is serialized and no register spills. 240
registers compute and 24 feed, or 232 and 40, and 135 to 255 where a warpgroup feeds itself; at M =
h = 128 shared memory is 149 KiB forward (channel: 165), 189 KiB in `linear_gradients` (197). No
chip has run it yet.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import (
  hopper,
  hopper_parts,
  linear_hopper_channel,
  linear_hopper_chunk,
  linear_hopper_step,
  linear_tiles,
)
from pallas_kernels.hopper_parts import Parts
from pallas_kernels.linear import Array, Normalized, Settings, State
from pallas_kernels.linear_hopper_walk import COLUMNS, EXTRA, READ, SCALE, WRITE, Inputs, walk
from pallas_kernels.linear_tiles import CHUNK, chunked

WIDEST_FLOAT32 = 128
"""Of q and k: three parts of a chunk of wider ones, and of the state, do not fit shared memory."""

MULTIPROCESSORS = 132
"""Of an H100 or H200."""


def unsupported(q, k, v, g, settings: Settings) -> str | None:
  """Why these kernels refuse a call, or None."""
  del settings
  if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype or v.dtype != q.dtype:
    return f"it multiplies bfloat16 or float32, not {q.dtype}, {k.dtype}, {v.dtype}"
  if q.dtype == jnp.float32 and q.shape[-1] > WIDEST_FLOAT32:
    return f"width of q and k {q.shape[-1]} is more than {WIDEST_FLOAT32} in float32"
  for name, x in (("width of q and k", q), ("width of v", v)):
    if x.shape[-1] > hopper.MAX_WIDTH:
      return f"{name} {x.shape[-1]} is more than {hopper.MAX_WIDTH}"
  if g is not None and g.ndim == 4 and g.shape[0] > hopper.MAX_BLOCKS:
    return f"batch {g.shape[0]} is more than {hopper.MAX_BLOCKS}, with decays per channel"
  return None


def parts(states: int, T: int, h: int) -> int:
  """How many parts of T tokens, of eight chunks or more, fill the chip with the walks of so many
  states, one block of threads to 64 columns.
  """
  blocks, many = states * -(-h // COLUMNS), 1
  while 2 * many * blocks <= MULTIPROCESSORS and T % (2 * many * 8 * CHUNK) == 0:
    many *= 2
  return many


def _widen(x: Array, axes: tuple[int, ...]) -> Array:
  """With zeros up to whole tiles along these axes."""
  pad = [(0, -size % 64 if axis in axes else 0) for axis, size in enumerate(x.shape)]
  return jnp.pad(x, pad) if any(after for _, after in pad) else x


def _whole(x: Array) -> Array:
  """`B T heads width` with zeros up to whole tiles, and rows up to a multiple of 8, which a bulk
  copy asks for.
  """
  x = _widen(x, (3,))
  rows = -x.shape[1] % 8
  return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, 0))) if rows else x


class _Call(NamedTuple):
  """A call whose widths are whole tiles, and what its decays add up to."""

  q: Parts
  k: Parts
  v: Parts
  kv: Array
  z: Array | None
  numbers: Array
  fade: Array
  pairs: Parts | None


def _token_call(q, k, v, g, state: State) -> _Call:
  B, T, N = q.shape[0], q.shape[1], state.kv.shape[1]
  q, k, v = (hopper_parts.cut(_whole(x)) for x in (q, k, v))
  M = q[0].shape[-1]
  sums = linear_tiles.sums(linear_tiles.per_token(g, B, T, N))
  numbers = jnp.stack([*sums[:4], *[jnp.zeros_like(sums.hi)] * 2], 3)
  fade = jnp.broadcast_to(sums.fade[..., None], (*sums.fade.shape, M))
  z = None if state.z is None else _widen(state.z, (2,))
  return _Call(q, k, v, _widen(state.kv, (2, 3)), z, numbers, fade, None)


def _channel_call(q, k, v, g, state: State, scale: Array | float, on_chip: bool) -> _Call:
  """With q, k and P faded; the rows of P times `scale`."""
  call = _token_call(q, k, v, None, state)
  g = _whole_chunks(g)
  faded = linear_hopper_channel.fade(
    call.q, call.k, g, jnp.broadcast_to(scale, call.numbers.shape[:3] + (CHUNK,)), on_chip=on_chip
  )
  total = g.reshape(g.shape[0], -1, CHUNK, *g.shape[2:]).sum(2).swapaxes(1, 2)
  return call._replace(q=faded.q, k=faded.k, pairs=faded.pairs, fade=jnp.exp(total))


def _whole_chunks(g: Array) -> Array:
  """Decays per channel with zeros up to whole chunks and whole tiles."""
  pad = ((0, 0), (0, -g.shape[1] % CHUNK), (0, 0), (0, -g.shape[3] % 64))
  return jnp.pad(g, pad).astype(jnp.float32)


def _call(q, k, v, g, state: State, scale: Array | float, on_chip: bool) -> _Call:
  if g is not None and g.ndim == 4:
    return _channel_call(q, k, v, g, state, scale, on_chip)
  return _token_call(q, k, v, g, state)


def _normalizers(call: _Call) -> tuple[Array, Array]:
  """(z that enters every chunk `B N C M`, z that leaves the last)."""
  k = _heads(chunked(hopper_parts.whole(call.k), 1), call.numbers.shape[1])
  add = jnp.einsum("bcjnm,bncj->bncm", k, call.numbers[:, :, :, WRITE],
                   precision="highest")  # fmt: skip
  assert call.z is not None
  return linear_tiles.walk(call.fade, add, call.z)


def _heads(x: Array, N: int) -> Array:
  return jnp.repeat(x, N // x.shape[3], 3)


def _read(call: _Call, z: Array) -> Array:
  """What z adds to every token's weight, `B N C CHUNK`."""
  q = _heads(chunked(hopper_parts.whole(call.q), 1), call.numbers.shape[1])
  return jnp.einsum("bcinm,bncm->bnci", q, z, precision="highest") * call.numbers[:, :, :, READ]


def forward(
  q: Array, k: Array, v: Array, g, state: State, settings: Settings, *, on_chip: bool = True
) -> tuple[Array, Array | None, State]:
  """(out, weight, state); `on_chip=False` for the interpreter."""
  (B, T), N, (M, h) = q.shape[:2], state.kv.shape[1], state.kv.shape[2:]
  call = _call(q, k, v, g, state, 1.0, on_chip)
  z = None
  if settings.normalize:
    before, z = _normalizers(call)
    call = call._replace(numbers=call.numbers.at[:, :, :, EXTRA].set(_read(call, before)))
    z = z[..., :M]
  out, weight, _, last = walk(
    Inputs(call.q, call.k, call.v, call.numbers, call.fade, call.pairs, call.kv),
    scale=settings.scale,
    normalize=settings.normalize,
    on_chip=on_chip,
  )
  if weight is not None:
    weight = weight.reshape(B, N, -1)[..., :T]
  return out[:, :T, :, :h], weight, State(last[..., :M, :h], z)


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
  *,
  on_chip: bool = True,
) -> tuple[Array, Array, Array, Array | None, State]:
  """(dq, dk, dv, dg, d_state)."""
  T = q.shape[1]
  M, h = state.kv.shape[2:]
  d_kv, z, d_z, d_z_start = _widen(d_state.kv, (2, 3)), None, None, None
  scale = jnp.float32(settings.scale) if normalized is None else chunked(normalized.inverse, 2)
  call = _call(q, k, v, g, state, scale, on_chip)
  numbers = call.numbers.at[:, :, :, SCALE].set(scale)
  if normalized is not None:
    assert d_state.z is not None
    d_weight = chunked(-normalized.inverse * normalized.delta, 2)
    numbers = numbers.at[:, :, :, EXTRA].set(d_weight)
    z, _ = _normalizers(call)
    d_z, d_z_start = _d_normalizers(call, d_weight, _widen(d_state.z, (2,)))
    d_z_start = d_z_start[..., :M]
  d_out_parts = hopper_parts.cut(_whole(d_out.astype(v.dtype)))
  one = functools.partial(walk, on_chip=on_chip)
  inputs = Inputs(None, call.k, call.v, numbers, call.fade, call.pairs, call.kv)
  states = one(inputs).states
  reads = numbers.at[:, :, :, READ].multiply(scale)
  back = one(inputs._replace(k=call.q, v=d_out_parts, numbers=reads, start=d_kv), reverse=True)
  assert states is not None and back.states is not None
  found = linear_hopper_chunk.gradients(
    linear_hopper_chunk.Inputs(
      call.q, call.k, call.v, d_out_parts, states, back.states, numbers, call.pairs, z, d_z
    ),
    on_chip=on_chip,
  )
  fade = (found.fade if z is None or d_z is None else found.fade + z * d_z) * call.fade
  dq, dk, dg = found.dq, found.dk, None
  if g is not None and call.pairs is not None:
    whole = linear_hopper_channel.Unfade(
      _whole(q), _whole(k), dq, dk, found.d_pairs, found.d_pairs_t, _whole_chunks(g), fade
    )
    dq, dk, dg = linear_hopper_channel.unfade(whole, on_chip=on_chip)
    dg = dg[:, :T, :, :M]
  elif g is not None:
    row, read, column, write = (found.sums[:, :, :, i] for i in range(4))
    dg = linear_tiles.d_token(row + read, column, write, fade.sum(-1))
    dg = dg.reshape(*dg.shape[:2], -1)[..., :T].swapaxes(1, 2)
    dg = dg.sum((0, 1)) if g.ndim == 1 else dg
  dq, dk, dv = (
    linear_tiles.grouped(x[:, :T], like.shape[2])[..., : like.shape[3]]
    for x, like in ((dq, q), (dk, k), (found.dv, v))
  )
  return dq, dk, dv, dg, State(back.last[..., :M, :h], d_z_start)


def _d_normalizers(call: _Call, d_weight: Array, d_z: Array) -> tuple[Array, Array]:
  """(the gradient of the z that leaves every chunk, of the z that enters the first)."""
  q = _heads(chunked(hopper_parts.whole(call.q), 1), d_weight.shape[1])
  read = d_weight * call.numbers[:, :, :, READ]
  add = jnp.einsum("bcinm,bnci->bncm", q, read, precision="highest")
  return linear_tiles.walk(call.fade, add, d_z, reverse=True)


def step(
  q: Array, k: Array, v: Array, g: Array | None, state: State, settings: Settings
) -> tuple[Array, State]:
  """(out `B N h`, state) after one token."""
  (B, N, M, h), dtype = state.kv.shape, v.dtype
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  fade = jnp.exp(jnp.zeros((1, 1, 1)) if g is None else g[..., None] if g.ndim < 3 else g)
  fade = jnp.broadcast_to(fade, (B, N, M))
  scale, z = jnp.full((B, N), settings.scale, jnp.float32), None
  if settings.normalize:
    assert state.z is not None
    q_heads, k_heads = (jnp.repeat(x, N // x.shape[1], 1) for x in (q, k))
    z = fade * state.z + k_heads
    weight = jnp.einsum("bnm,bnm->bn", q_heads, z, precision="highest")
    scale = jnp.where(weight == 0, 0.0, 1 / jnp.where(weight == 0, 1.0, weight))
  widen = functools.partial(_widen, axes=(2,))
  out, kv = linear_hopper_step.step(
    linear_hopper_step.Inputs(
      widen(q),
      widen(k),
      widen(v),
      widen(fade),
      jnp.broadcast_to(scale[..., None], (B, N, linear_hopper_step.COLUMNS)),
      _widen(state.kv, (2, 3)),
    )
  )
  return out[..., :h].astype(dtype), State(kv[..., :M, :h], z)
