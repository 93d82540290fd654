"""Linear attention: the past as one matrix per head, with or without decay.

    S_t = exp(g_t) S_{t-1} + phi(k_t) v_t^T          state [M h], read after the write
    z_t = exp(g_t) z_{t-1} + phi(k_t)                normalizer [M], only with normalize=True
    o_t = scale * phi(q_t) S_t       or, normalized,      o_t = phi(q_t) S_t / (phi(q_t) . z_t)

One call, many papers; what differs is the decay g <= 0, carried as a logarithm and never as exp(g):

| mechanism                        | log_decay             | phi, normalize     | scale | source |
|----------------------------------|-----------------------|--------------------|-------|--------|
| linear attention, Performer, ... | None                  | elu_plus_one, True | -     | [1]    |
| RetNet                           | [N] log(1 - 2^(-5-n)) | identity, False    | H^-.5 | [2]    |
| Lightning attention              | [N] a slope per head  | identity, False    | 1     | [3]    |
| Mamba-2's SSD (q=C, k=B, v=dt x) | [B T N] -exp(A) dt    | identity, False    | 1     | [4]    |
| GLA                              | [B T N H]             | identity, False    | H^-.5 | [5]    |
| HGRN2 (k = 1 - exp(g))           | [B T N H]             | identity, False    | 1     | [6]    |

[1] https://arxiv.org/abs/2006.16236, eq. 9-12    [2] https://arxiv.org/abs/2307.08621, eq. 6
[3] https://arxiv.org/abs/2401.04658              [4] https://arxiv.org/abs/2405.21060, eq. 16
[5] https://arxiv.org/abs/2312.06635, eq. 3       [6] https://arxiv.org/abs/2404.07904

`chunked` cuts time into chunks of C tokens. Inside a chunk it is attention with a decayed lower
triangle of scores; between chunks it is the recurrence, C steps at once (`attention/chunks.py` has
the decays, exact for any g from 0 to -inf):

    P  = (Q K^T) * exp(between)
    O  = P V + (Q * exp(prefix)) S
    S' = exp(total) S + (K * exp(suffix))^T V

Cost: O(T C (M + h) + T M h) flops; memory O(T), forward and backward. The backward pass keeps the
inputs, and the states that enter groups of chunks where these are few beside them; else it runs the
states forward once more. It walks the groups back, each recomputed as it is needed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from attention import context_parallel, dispatch, explicit, feature_maps, linear_kernels, loops
from attention.chunk_scan import (
  Rule,
  State,
  Tokens,
  cut,
  divide,
  full_decay,
  group_size,
  join,
  make_marks,
  real_tokens,
  scan,
  spread,
  sum_dtype,
)
from attention.context_parallel import TimeAxis
from attention.dispatch import Implementation
from attention.feature_maps import FeatureMap
from attention.linear_call import DEFAULT_CHUNK, Call, check_step, describe
from attention.linear_kernels import Token
from attention.types import Cost, Key, Output, Query, SegmentIds, Value


@explicit.op("B T N", "B N", asked_by="return_state")
def linear_attention(
  q: Query,
  k: Key,
  v: Value,
  *,
  log_decay: Float[Array, "..."] | None = None,
  feature_map: FeatureMap | str | None = None,
  normalize: bool = False,
  initial_state: State | None = None,
  return_state: bool = False,
  segment_ids: SegmentIds | None = None,
  positions: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  reverse: bool = False,
  bidirectional: bool = False,
  axis_name: str | None = None,
  chunk_size: int | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Output | tuple[Output, State]:
  """Linear attention with optional decay; see the top of the file for the equation and its papers.

  Differentiable in q, k, v, log_decay, initial_state and the feature map's arrays, through the
  output and through the state; gradients differentiate again, in reverse mode.

  Args:
    q, k, v: [B T N H], [B T K H], [B T K h]. The output has as many heads as the one of q and v
      that has more, N; each of q, k and v may have any number of heads x that divides N, and output
      head n reads head n // (N / x) of it. So keys and values may be shared by queries (K divides
      N), and queries and keys by values (Mamba-2's C and B, by the heads of x).
    log_decay: g <= 0, natural logarithm: None, [N] per head, [B T N] per token and head, or [B T N
      M] per channel of phi.
    feature_map: phi, from `feature_maps` or its name; None is the identity.
    normalize: divide by the sum of the weights. A row whose weights sum to exactly 0 gives 0, with
      zero gradient.
    initial_state: what came before; None is zeros. It belongs to the first segment.
    return_state: also return the state after the last token: of the last segment, of the last
      direction walked.
    segment_ids: a new document begins wherever the id differs from the token before, from a state
      of zeros.
    positions: handed to the feature map; by default 0, 1, 2, ...
    lengths: tokens of row b from lengths[b] on are padding: they leave the state as it is, and
      their outputs are 0.
    reverse: the recurrence runs from the last token to the first: token t reads what is written at
      t and after.
    bidirectional: token t reads every token, decayed by the distance on both sides, itself once.
    axis_name: inside of `jax.shard_map`, the axis of the mesh that cuts time: the T tokens here
      stand between those of the devices beside this one; initial_state, the state before all of
      them, is the same everywhere, as is the state returned (`attention/context_parallel.py`).
    chunk_size: C, a power of two; changes speed and the last bits.
    scale: factor on unnormalized outputs. The default is 1, not H^-0.5 as in softmax: a feature map
      carries its own scale, a normalizer cancels any, and Mamba-2, Lightning and HGRN2 have none;
      pass q.shape[-1]**-0.5 for GLA and RetNet.
    implementation: "hopper" or "tpu" (the kernels of those chips, differentiable once), "chunked",
      "reference", or None for the best.

  Returns:
    The output [B T N h] in v's dtype, and with `return_state` the state.

  Raises:
    ValueError: shapes disagree, or arguments exclude each other.
  """
  call = describe(
    q, k, v, log_decay=log_decay, feature_map=feature_map, normalize=normalize,
    initial_state=initial_state, return_state=return_state, segment_ids=segment_ids,
    positions=positions, lengths=lengths, reverse=reverse, bidirectional=bidirectional,
    axis_name=axis_name, chunk_size=chunk_size, scale=scale,
  )  # fmt: skip
  out, state = _run(call, implementation)
  return (out, state) if return_state else out


def _run(call: Call, implementation: str | None = None) -> tuple[Output, State]:
  name = dispatch.choose(implementation, IMPLEMENTATIONS, call)  # refuses before an axis is read
  if call.time_axis is not None and call.positions is None:
    T = call.q.shape[1]
    at = lax.axis_index(call.time_axis.name) * T + jnp.arange(T, dtype=jnp.int32)
    call = call._replace(positions=at[None])
  if not isinstance(call.scale, jax.Array | np.ndarray):
    return dispatch.run(name, IMPLEMENTATIONS, call)
  out, state = dispatch.run(name, IMPLEMENTATIONS, call._replace(scale=1.0))
  if not call.normalize:
    scale = jnp.asarray(call.scale, sum_dtype(out))
    out = (out.astype(scale.dtype) * scale).astype(out.dtype)
  return out, state


def chunked(call: Call) -> tuple[Output, State]:
  """The call in chunks: matrix products inside and between them, one pass over time."""
  v = call.v
  if call.bidirectional:  # the sum of two walks is rounded once
    v = v.astype(sum_dtype(call.q))
  out, state = _directed(_chunked, call._replace(v=v))
  return out.astype(call.v.dtype), state


def _directed(walk: Callable[[Call], tuple[Output, State]], call: Call) -> tuple[Output, State]:
  """A call of any direction by `walk`, which goes from the first token to the last."""
  if call.bidirectional:
    return _both_ways(walk, call)
  if call.reverse:
    out, state = _directed(walk, _flipped(call))
    return jnp.flip(out, axis=1), state
  if call.time_axis is not None:
    entering, final = _states(call, call.time_axis)
    out, _ = walk(call._replace(initial_state=entering, time_axis=None))
    return out, context_parallel.shared(final, call.time_axis)
  return walk(call)


def _states(call: Call, axis: TimeAxis) -> tuple[State, State]:
  """What enters this device's tokens, and what all devices' leave."""
  dtype = sum_dtype(call.q)
  k = call.feature_map(call.k.astype(dtype), positions=call.positions, is_query=False)
  g = full_decay(call.log_decay, (*call.q.shape[:2], call.num_heads))
  g = None if g is None else g.astype(dtype)
  initial = _initial_state(call, loops.zero((call.q, k, call.v, g), dtype))
  entering, final = context_parallel.states(
    k, call.v.astype(dtype), g, call.segment_ids, initial, axis
  )
  return entering, final if call.normalize else final._replace(z=initial.z)


def _chunked(call: Call) -> tuple[Output, State]:
  (B, T), N = call.q.shape[:2], call.num_heads
  dtype = sum_dtype(call.q)
  C = min(call.chunk_size, 1 << max(T - 1, 0).bit_length())
  tokens = Tokens(call.q, call.k, call.v, full_decay(call.log_decay, (B, T, N)))
  M, h = call.feature_map.num_features(call.q.shape[3]), call.v.shape[3]
  if not B * T:
    zero = loops.zero(tokens, call.v.dtype)
    return jnp.zeros((B, T, N, h)) + zero, _initial_state(call, zero.astype(dtype))
  G = group_size(T, C, B * N * C * max(C, M, h))
  marks = make_marks((B, T), C, G, call.positions, call.lengths, call.segment_ids)
  state = _initial_state(call, loops.zero(marks, dtype))
  phi, state, tokens = loops.together((call.feature_map, state, tokens))

  precision = lax.Precision.HIGHEST if call.q.dtype.itemsize >= 4 else lax.Precision.DEFAULT
  rule = Rule(N, dtype, call.normalize, call.scale, precision)
  groups = jax.tree.map(lambda x: cut(x, C, G), tokens)
  state, out = scan(rule, phi, state, groups, marks)
  out = join(out, B)[:, :T]
  if call.lengths is not None:
    out = jnp.where(real_tokens(T, call.lengths)[..., None, None], out, 0)
  return out, state


def _initial_state(call: Call, zero: jax.Array) -> State:
  """What the walk begins with, in the dtype of `zero` and typed as it is inside of shard_map."""
  (B, _, _, H), N, h = call.q.shape, call.num_heads, call.v.shape[3]
  M = call.feature_map.num_features(H)
  state = call.initial_state or State(jnp.zeros((B, N, M, h)), jnp.zeros((B, N, M)))
  return jax.tree.map(lambda x: x.astype(zero.dtype) + zero, state)


def _flipped(call: Call) -> Call:
  """The call that walks the other way: every array with a time axis flipped."""
  T = call.q.shape[1]
  positions = jnp.arange(T)[None] if call.positions is None else call.positions
  g = call.log_decay
  flip = functools.partial(jnp.flip, axis=1)
  return call._replace(
    q=flip(call.q),
    k=flip(call.k),
    v=flip(call.v),
    log_decay=g if g is None or g.ndim == 1 else flip(g),
    positions=flip(positions),
    time_axis=call.time_axis and call.time_axis._replace(reverse=True),
    segment_ids=None if call.segment_ids is None else flip(call.segment_ids),
    reverse=False,
  )


def _both_ways(walk: Callable[[Call], tuple[Output, State]], call: Call) -> tuple[Output, State]:
  """Every token reads every token: one state for all, or two walks less each own write once."""
  (B, T), N, dtype = call.q.shape[:2], call.num_heads, sum_dtype(call.q)
  q = call.feature_map(call.q.astype(dtype), positions=call.positions, is_query=True)
  k = call.feature_map(call.k.astype(dtype), positions=call.positions, is_query=False)
  one_way = _one_way(call)
  v = one_way.v.astype(dtype)
  empty = State(jnp.zeros((B, N, 0, 0), dtype), jnp.zeros((B, N, 0), dtype))
  if call.log_decay is None and call.segment_ids is None:
    K = math.lcm(k.shape[2], v.shape[2])  # one state for the heads that share both
    q, k, v = spread(q, N, 2), spread(k, K, 2), spread(v, K, 2)
    q = q.reshape(B, T, K, N // K, q.shape[-1])
    kv = jnp.einsum("btkm,btkh->bkmh", k, v, precision=lax.Precision.HIGHEST)
    kv = kv if call.time_axis is None else lax.psum(kv, call.time_axis.name)
    out = jnp.einsum("btkgm,bkmh->btkgh", q, kv, precision=lax.Precision.HIGHEST)
    out = out.reshape(B, T, N, v.shape[-1])
  else:
    own = jnp.sum(spread(q, N, 2) * spread(k, N, 2), axis=-1, keepdims=True) * spread(v, N, 2)
    there, back = (
      _directed(walk, one_way._replace(reverse=reverse))[0] for reverse in (False, True)
    )
    out = there.astype(dtype) + back.astype(dtype) - own
  out = divide(out[..., :-1], out[..., -1:]) if call.normalize else out * call.scale
  return out.astype(call.v.dtype), empty


def _one_way(call: Call) -> Call:
  """Either walk of a bidirectional call: unnormalized, the weights' sum as one more value."""
  v = call.v
  if call.normalize:
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  return call._replace(v=v, normalize=False, bidirectional=False, scale=1.0)


def reference(
  q: Query,
  k: Key,
  v: Value,
  *,
  is_causal: bool = True,
  bidirectional: bool = False,
  return_state: bool = False,
  implementation: str | None = None,
  **options: Any,
) -> Output | tuple[Output, State]:
  """The recurrence, token by token, in float32 (float64 for float64 inputs): the oracle.

  It takes what `linear_attention` takes; `is_causal=False` says `bidirectional=True`, in the words
  of the Variant protocol; `chunk_size` and `implementation` mean nothing here.
  """
  del implementation
  both = bidirectional or not is_causal
  call = describe(q, k, v, bidirectional=both, return_state=return_state, **options)
  out, state = _run(call, "reference")
  return (out, state) if return_state else out


def _recurrence(call: Call) -> tuple[Output, State]:
  (B, T), N, h = call.q.shape[:2], call.num_heads, call.v.shape[3]
  dtype = jnp.float64 if call.q.dtype == jnp.float64 else jnp.float32
  phi = call.feature_map
  q = phi(call.q.astype(dtype), positions=call.positions, is_query=True)
  k = phi(call.k.astype(dtype), positions=call.positions, is_query=False)
  q, k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (q, k, call.v.astype(dtype)))
  g = jnp.zeros((N,)) if call.log_decay is None else call.log_decay
  g = g[None, None, :, None] if g.ndim == 1 else g[..., None] if g.ndim == 3 else g
  a = jnp.broadcast_to(jnp.exp(g.astype(dtype)), k.shape)
  last = T if call.lengths is None else call.lengths.astype(int)[:, None]
  real = jnp.broadcast_to(jnp.arange(T)[None] < last, (B, T))
  k, v, a = (jnp.where(real[..., None, None], x, n) for x, n in ((k, 0), (v, 0), (a, 1)))
  ids = jnp.zeros((B, T), int) if call.segment_ids is None else call.segment_ids
  turns = ids[:, 1:] != ids[:, :-1]

  def token(state: State, x):
    q, k, v, a, fresh = x
    a = jnp.where(fresh[:, None, None], 0, a)
    kv = a[..., None] * state.kv + k[..., None] * v[..., None, :]
    z = a * state.z + k if call.normalize else state.z
    out = jnp.einsum("bnm,bnmh->bnh", q, kv, precision="highest")
    return State(kv, z), (out, jnp.einsum("bnm,bnm->bn", q, z, precision="highest")[..., None])

  def walk(state: State, backward: bool):
    fresh = jnp.pad(turns, [(0, 0), (0, 1) if backward else (1, 0)]) & real
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, a, fresh))
    state, outs = lax.scan(token, state, xs, reverse=backward)
    return state, [jnp.moveaxis(x, 0, 1) for x in outs]

  M = k.shape[-1]
  state = call.initial_state or State(jnp.zeros((B, N, M, h)), jnp.zeros((B, N, M)))
  state = State(state.kv.astype(dtype), state.z.astype(dtype))
  if call.bidirectional:
    (_, (out, weight)), (_, (out_r, weight_r)) = walk(state, False), walk(state, True)
    own = jnp.einsum("btnm,btnm->btn", q, k, precision="highest")[..., None]
    out, weight = out + out_r - own * v, weight + weight_r - own
  else:
    state, (out, weight) = walk(state, call.reverse)
  out = divide(out, weight) if call.normalize else out * call.scale
  return jnp.where(real[..., None, None], out, 0).astype(call.v.dtype), state


def _kernel(chip: str) -> Implementation:
  """The hand-written kernel for a chip; it walks one way."""

  def unsupported(call: Call) -> str | None:
    return linear_kernels.unsupported(chip, _one_way(call) if call.bidirectional else call)

  return Implementation(run=functools.partial(_directed, _in_parts(chip)), unsupported=unsupported)


def _in_parts(chip: str) -> Callable[[Call], tuple[Output, State]]:
  """The walk of a chip's kernel. Where a batch has too few heads to fill the chip, time is cut into
  parts that walk side by side, as more rows of the batch, each from the state that enters it.
  """
  axis = TimeAxis("parts of time")

  def walk(call: Call) -> tuple[Output, State]:
    (B, T), parts = call.q.shape[:2], linear_kernels.parts(chip, call)
    if parts == 1:
      return linear_kernels.run(chip, call)
    positions = jnp.arange(T, dtype=jnp.int32)[None] if call.positions is None else call.positions
    g = full_decay(call.log_decay, (B, T, call.num_heads))
    whole = {"q": call.q, "k": call.k, "v": call.v, "log_decay": g,
             "positions": positions, "segment_ids": call.segment_ids}  # fmt: skip
    cut = jax.tree.map(lambda x: x.reshape(x.shape[0], parts, -1, *x.shape[2:]), whole)
    states = lambda part: _states(call._replace(**part), axis)
    entering, final = jax.vmap(states, in_axes=1, out_axes=1, axis_name=axis.name)(cut)
    rows = lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])).reshape(B * parts, *x.shape[2:])
    cut = jax.tree.map(rows, cut)
    g = cut["log_decay"]
    cut["log_decay"] = g[..., 0] if g is not None and g.shape[-1] == 1 else g
    call = call._replace(**cut, initial_state=jax.tree.map(rows, entering))
    out = linear_kernels.run(chip, call)[0]
    return out.reshape(B, T, *out.shape[2:]), jax.tree.map(lambda x: x[:, -1], final)

  return walk


IMPLEMENTATIONS = {
  "hopper": _kernel("hopper"),
  "tpu": _kernel("tpu"),
  "chunked": Implementation(run=chunked, unsupported=lambda call: None),
  "reference": Implementation(
    run=_recurrence,
    unsupported=lambda call: "it runs on one device" if call.time_axis else None,
  ),
}
"""Every way to compute `linear_attention`, the best first."""


# --- decoding, and the functions of the Variant protocol ------------------------------------------


class DecodeState(NamedTuple):
  """What a decoder carries from token to token; its size does not grow."""

  kv: Float[Array, "B N M h"]
  z: Float[Array, "B N M"]
  position: Int[Array, " B"]
  """Tokens seen, for feature maps that ask."""


@explicit.op("B T N")
def attend(
  q: Query,
  k: Key,
  v: Value,
  *,
  is_causal: bool = True,
  segment_ids: SegmentIds | None = None,
  implementation: str | None = None,
  log_decay: Float[Array, "..."] | None = None,
  feature_map: FeatureMap | str | None = None,
  normalize: bool = False,
  scale: float | None = None,
) -> Output:
  """`linear_attention` by the Variant protocol: causal, or both ways."""
  call = describe(
    q, k, v, log_decay=log_decay, feature_map=feature_map, normalize=normalize, scale=scale,
    segment_ids=segment_ids, bidirectional=not is_causal,
  )  # fmt: skip
  return _run(call, implementation)[0]


def init_state(
  batch: int,
  *,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  value_dim: int,
  max_length: int,
  dtype: Any = jnp.float32,
  feature_map: FeatureMap | str | None = None,
  normalize: bool = False,
  scale: float | None = None,
) -> DecodeState:
  """A past of nothing. It is float32 whatever `dtype` is, and no `max_length` makes it larger; a
  feature map may have no room for one.
  """
  del num_kv_heads, dtype, normalize, scale
  phi = feature_maps.get(feature_map, head_dim)
  feature_maps.check_length(phi, max_length, None)
  M = phi.num_features(head_dim)
  return DecodeState(
    jnp.zeros((batch, num_heads, M, value_dim), jnp.float32),
    jnp.zeros((batch, num_heads, M), jnp.float32),
    jnp.zeros((batch,), jnp.int32),
  )


def prefill(
  state: DecodeState,
  q: Query,
  k: Key,
  v: Value,
  *,
  lengths: Int[Array, " B"] | None = None,
  log_decay: Float[Array, "..."] | None = None,
  feature_map: FeatureMap | str | None = None,
  normalize: bool = False,
  scale: float | None = None,
) -> tuple[DecodeState, Output]:
  """Appends T tokens, or the first lengths[b] of row b; outputs of the others are 0."""
  T = q.shape[1]
  call = describe(
    q, k, v, log_decay=log_decay, feature_map=feature_map, normalize=normalize, scale=scale,
    lengths=lengths, initial_state=State(state.kv, state.z), return_state=True,
    positions=state.position[:, None] + jnp.arange(T, dtype=jnp.int32)[None],
  )  # fmt: skip
  out, new = _run(call)
  seen = jnp.int32(T) if lengths is None else lengths.astype(jnp.int32)
  return DecodeState(new.kv, new.z, state.position + seen), out


def step(
  state: DecodeState,
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K h"],
  *,
  log_decay: Float[Array, "..."] | None = None,
  feature_map: FeatureMap | str | None = None,
  normalize: bool = False,
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[DecodeState, Float[Array, "B N h"]]:
  """One token: decay, write, read; the same cost after any past. log_decay: [N], [B N], [B N M].

  `implementation` is "xla", or by name alone "hopper" or "tpu": kernels that read the state once,
  and that no chip has timed yet beside "xla".
  """
  phi = feature_maps.get(feature_map, q.shape[-1])
  check_step(State(state.kv, state.z), q, k, v, log_decay, phi)
  feature_maps.check_normalized(phi, normalize)
  at, dtype = state.position[:, None], state.kv.dtype
  keys = phi(k.astype(dtype)[:, None], positions=at, is_query=False)[:, 0]
  queries = phi(q.astype(dtype)[:, None], positions=at, is_query=True)[:, 0]
  scale = 1.0 if scale is None else scale
  token = Token(queries, keys, v, log_decay, state.kv, state.z, scale, normalize)
  out, kv, z = dispatch.run(implementation, STEPS, token)
  return DecodeState(kv, z, state.position + 1), out.astype(v.dtype)


def _plain_step(x: Token) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(output, kv, z), in the dtype of the state."""
  (kv, z), dtype = (x.kv, x.z), x.kv.dtype
  q, k, v = (spread(array.astype(dtype), kv.shape[1], 1) for array in (x.q, x.k, x.v))
  if x.g is not None:
    g = x.g.astype(dtype)
    fade = jnp.exp(g[None, :, None] if g.ndim == 1 else g[..., None] if g.ndim == 2 else g)
    kv, z = kv * fade[..., None], z * fade
  kv = kv + k[..., :, None] * v[..., None, :]
  out = jnp.einsum("bnm,bnmh->bnh", q, kv, precision=lax.Precision.HIGHEST)
  if not x.normalize:
    return out * x.scale, kv, z
  z = z + k
  weight = jnp.einsum("bnm,bnm->bn", q, z, precision=lax.Precision.HIGHEST)
  return divide(out, weight[..., None]), kv, z


def _step_kernel(chip: str) -> Implementation:
  return Implementation(
    run=functools.partial(linear_kernels.step, chip),
    unsupported=functools.partial(linear_kernels.step_unsupported, chip),
  )


STEPS = {
  "xla": Implementation(run=_plain_step, unsupported=lambda token: None),
  "hopper": _step_kernel("hopper"),
  "tpu": _step_kernel("tpu"),
}
"""Every way to compute `step`."""


def cost(
  B: int,
  T: int,
  S: int,
  N: int,
  K: int,
  H: int,
  h: int,
  *,
  feature_map: FeatureMap | str | None = None,
  normalize: bool = False,
  scale: float | None = None,
) -> Cost:
  """What a causal forward pass of `chunked` costs in float32, the making of features aside."""
  del S, scale
  M = feature_maps.get(feature_map, H).num_features(H)
  C = min(DEFAULT_CHUNK, T)
  wide = h + 1 if normalize else h
  flops = 2.0 * B * N * T * (C * (M + wide) + 2 * M * wide)
  moved = 4.0 * B * T * (N * H + K * H + K * h + N * h)
  return Cost(flops=flops, bytes=moved, state_bytes=4.0 * B * N * M * (h + 1))
