"""A gated recurrence channel by channel: the past as one number each.

    x_t = exp(log_a_t) x_{t-1} + b_t                       log_a <= 0, carried as a logarithm

It is what the RG-LRU (De et al. 2024, "Griffin", eq. 4, https://arxiv.org/abs/2402.19427), minGRU
(https://arxiv.org/abs/2410.01201) and, with real decays where theirs are complex, HGRN
(https://arxiv.org/abs/2311.04823, eq. 4) and S5 (https://arxiv.org/abs/2208.04933) have in common.
As a mechanism of queries, keys and values it is attention whose products are all elementwise:

    x_t = exp(log_decay_t) x_{t-1} + k_t v_t               o_t = q_t x_t

so q is an output gate, k an input gate, and v what is written.

`associative` cuts time into chunks. Two steps compose to one of the same kind, (a, b) then (a', b')
is (a a', a' b + b'), so a chunk is a parallel prefix of log2(C) levels, and the chunks follow one
another. Every factor is an exp of something <= 0, products of them can only underflow to what is
truly zero, and nothing is ever divided: it is exact for any log_a from 0 to -inf. `hopper` and
`tpu` are kernels that walk along the sequence and keep the states on the chip
(`pallas_kernels/linear_scan_*.py`). The backward pass of all three is the same scan the other way,
g_t = dx_t + exp(log_a_{t+1}) g_{t+1}; it keeps the decays and x.

Cost: O(T) operations per channel by a kernel and O(T log C) by `associative`, all of them bound by
memory; O(T) memory, both ways.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from attention import chunk_scan, dispatch, explicit, kernels, loops
from attention.dispatch import Implementation
from attention.linear_call import check_real
from attention.types import Cost, Key, Output, Query, SegmentIds, Value

CHUNK = 128


class Call(NamedTuple):
  """A checked call of `linear_scan`, as data."""

  b: Float[Array, "B T D"]
  log_a: Float[Array, "B T D"]
  initial_state: Float[Array, "B D"] | None
  segment_ids: SegmentIds | None
  lengths: Int[Array, " B"] | None
  reverse: bool


@explicit.op("B T D", "B D", of="B T D", asked_by="return_state")
def linear_scan(
  b: Float[Array, "B T D"],
  log_a: Float[Array, "B T D"],
  *,
  initial_state: Float[Array, "B D"] | None = None,
  return_state: bool = False,
  segment_ids: SegmentIds | None = None,
  lengths: Int[Array, " B"] | None = None,
  reverse: bool = False,
  implementation: str | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
  """x_t = exp(log_a_t) x_{t-1} + b_t; see the top of the file.

  Differentiable in b, log_a and initial_state, through x and through the state; gradients
  differentiate again, in reverse mode.

  Args:
    b: what each token adds.
    log_a: natural logarithm of what is kept of the past, 0 to -inf.
    initial_state: x before the first token; None is zeros. It belongs to the first segment.
    return_state: also return x after the last token, float32 (float64 for float64 inputs).
    segment_ids: a new document begins wherever the id differs from the token before, from zeros.
    lengths: tokens of row b from lengths[b] on are padding: they leave the state as it is, and
      their outputs are 0.
    reverse: from the last token to the first.
    implementation: "hopper", "tpu", "associative", "reference", or None for the best that runs.

  Returns:
    x in b's dtype, and with `return_state` the state [B D].

  Raises:
    ValueError: shapes disagree, or arguments exclude each other.
  """
  call = describe(
    b, log_a, initial_state=initial_state, return_state=return_state, segment_ids=segment_ids,
    lengths=lengths, reverse=reverse,
  )  # fmt: skip
  x, state = _run(call, implementation)
  return (x, state) if return_state else x


def _run(call: Call, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
  return dispatch.run(implementation, IMPLEMENTATIONS, call)


def describe(
  b: Any,
  log_a: Any,
  *,
  initial_state: Any = None,
  return_state: bool = False,
  segment_ids: Any = None,
  lengths: Any = None,
  reverse: bool = False,
) -> Call:
  """Checks the arguments of `linear_scan` and returns the call as data. Computes nothing."""
  del return_state
  if b.ndim != 3:
    raise ValueError(f"b must be [B T D], got {b.shape}")
  check_real(b=b, log_a=log_a)
  B, T, D = b.shape
  wanted = {
    "log_a": (log_a, b.shape),
    "initial_state": (initial_state, (B, D)),
    "segment_ids": (segment_ids, (B, T)),
    "lengths": (lengths, (B,)),
  }
  for name, (array, shape) in wanted.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"{name} must be of shape {shape} as b {b.shape} says, got {array.shape}")
  if reverse and lengths is not None:
    raise ValueError(
      "lengths pads the end, where reverse=True begins; flip the inputs instead, got both"
    )
  return Call(b, log_a, initial_state, segment_ids, lengths, reverse)


class Walk(NamedTuple):
  """How a scan runs."""

  chip: str | None
  """Whose kernel, or None for `associative`."""
  reverse: bool


def _scanned(chip: str | None, call: Call) -> tuple[jax.Array, jax.Array]:
  """The call by one scan: padding neither keeps less nor adds, a document's first token keeps
  nothing.
  """
  B, T, D = call.b.shape
  dtype = chunk_scan.sum_dtype(call.b)
  log_a, b = call.log_a.astype(dtype), call.b.astype(dtype)
  real = None
  if call.lengths is not None:
    real = chunk_scan.real_tokens(T, call.lengths)[..., None]
    log_a, b = (jnp.where(real, x, 0) for x in (log_a, b))
  if call.segment_ids is not None:
    starts = _turns(call.segment_ids, call.reverse)[..., None]
    log_a = jnp.where(starts if real is None else starts & real, -jnp.inf, log_a)
  state = jnp.zeros((B, D)) if call.initial_state is None else call.initial_state
  state = state.astype(dtype)
  x = scan(Walk(chip, call.reverse), *loops.together((log_a, b, state)))
  # Padding repeats the state, so the last x is what real tokens left.
  state = x[:, 0 if call.reverse else -1] if T else state
  x = x if real is None else jnp.where(real, x, 0)
  return x.astype(call.b.dtype), state


def _turns(segment_ids: Int[Array, "B T"], reverse: bool) -> jax.Array:
  """Which tokens are the first of a document, as the scan meets them, `B T`."""
  if reverse:
    return jnp.flip(chunk_scan.begins(jnp.flip(segment_ids, axis=1)), axis=1)
  return chunk_scan.begins(segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(walk: Walk, log_a: jax.Array, b: jax.Array, state: jax.Array) -> jax.Array:
  """x of log decays and inputs [B T D], from `state` [B D]."""
  if walk.chip is not None and b.size:
    kernel = functools.partial(_kernel(walk.chip).scan, reverse=walk.reverse)
    return sequential_vmap(kernel)(log_a, b, state)
  if walk.reverse:
    flip = functools.partial(jnp.flip, axis=1)
    return flip(_prefix(flip(log_a), flip(b), state))
  return _prefix(log_a, b, state)


def _prefix(log_a: jax.Array, b: jax.Array, state: jax.Array) -> jax.Array:
  """x in chunks, each a parallel prefix."""
  if not b.size:
    return b
  T = b.shape[1]
  C = min(CHUNK, 1 << max(T - 1, 0).bit_length())

  def chunk(state, piece):
    log_a, b = piece
    kept, added = lax.associative_scan(_compose, (jnp.exp(log_a), b), axis=1)
    x = kept * state[:, None] + added
    return x[:, -1], x

  _, x = lax.scan(chunk, state, (chunk_scan.cut(log_a, C), chunk_scan.cut(b, C)))
  return jnp.moveaxis(x, 0, 1).reshape(b.shape[0], -1, b.shape[2])[:, :T]


def _compose(first, second):
  """Two steps as one."""
  return first[0] * second[0], first[1] * second[0] + second[1]


def _scan_forward(walk, log_a, b, state):
  x = scan(walk, log_a, b, state)
  return x, (log_a, x, state)


def _scan_backward(walk, saved, dx):
  """The scan from the other end, over decays one token later."""
  log_a, x, state = saved
  none, state = jnp.zeros_like(log_a[:, :1]), state[:, None]
  if walk.reverse:
    later, before = ([none, log_a[:, :-1]], [x[:, 1:], state])
  else:
    later, before = ([log_a[:, 1:], none], [state, x[:, :-1]])
  later, before = (jnp.concatenate(each, axis=1) for each in (later, before))
  first = -1 if walk.reverse else 0
  db = scan(walk._replace(reverse=not walk.reverse), later, dx, jnp.zeros_like(state[:, 0]))
  kept = jnp.exp(log_a) * db
  return kept * before, db, kept[:, first]


scan.defvjp(_scan_forward, _scan_backward)


_kernel = functools.partial(kernels.module, "linear_scan")


def _unsupported(chip: str, call: Call) -> str | None:
  """Why a kernel cannot run the call, forward and backward, or None."""
  if chunk_scan.sum_dtype(call.b) == jnp.float64:
    return f"it computes in float32, got {call.b.dtype}"
  return kernels.unsupported(chip, (call.b, call.log_a))


def recurrence(call: Call) -> tuple[jax.Array, jax.Array]:
  """The equation, token by token: the oracle."""
  (B, T, D), dtype = call.b.shape, jnp.float32
  dtype = jnp.float64 if call.b.dtype == jnp.float64 else dtype
  last = jnp.full((B,), T) if call.lengths is None else call.lengths.astype(int)
  ids = jnp.zeros((B, T), int) if call.segment_ids is None else call.segment_ids
  turns = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (0, 1) if call.reverse else (1, 0)])

  def token(x, inputs):
    b, log_a, fresh, t = inputs
    real = (t < last)[:, None]
    new = jnp.where(fresh[:, None], 0, jnp.exp(log_a) * x) + b
    return jnp.where(real, new, x), jnp.where(real, new, 0)

  x = jnp.zeros((B, D)) if call.initial_state is None else call.initial_state
  by_time = [jnp.moveaxis(i, 1, 0) for i in (call.b.astype(dtype), call.log_a.astype(dtype), turns)]
  state, x = lax.scan(token, x.astype(dtype), (*by_time, jnp.arange(T)), reverse=call.reverse)
  return jnp.moveaxis(x, 0, 1).astype(call.b.dtype), state


def _by(chip: str | None) -> Implementation:
  unsupported = (lambda call: None) if chip is None else functools.partial(_unsupported, chip)
  return Implementation(run=functools.partial(_scanned, chip), unsupported=unsupported)


IMPLEMENTATIONS = {
  "hopper": _by("hopper"),
  "tpu": _by("tpu"),
  "associative": _by(None),
  "reference": Implementation(run=recurrence, unsupported=lambda call: None),
}
"""Every way to compute `linear_scan`, the best first."""


# --- decoding, and the functions of the Variant protocol ------------------------------------------


class DecodeState(NamedTuple):
  """What a decoder carries from token to token."""

  x: Float[Array, "B N H"]


def _check(q, k, v, log_decay) -> tuple[int, int]:
  """(N, H), of which all four are; heads may be shared."""
  N, H = max(q.shape[-2], v.shape[-2]), q.shape[-1]
  for name, x in (("q", q), ("k", k), ("v", v)):
    if N % x.shape[-2]:
      raise ValueError(f"{name}'s heads must divide the output's {N}, got {x.shape[-2]}")
    if x.shape[-1] != H or x.shape[:-2] != q.shape[:-2]:
      raise ValueError(f"{name} must be as q {q.shape}, but for the heads, got {x.shape}")
  if log_decay.shape != (*q.shape[:-2], N, H):
    wanted = (*q.shape[:-2], N, H)
    raise ValueError(f"log_decay must be of shape {wanted}, got {log_decay.shape}")
  return N, H


def _written(k: jax.Array, v: jax.Array, num_heads: int) -> jax.Array:
  """k v, of all heads, in the dtype of sums."""
  dtype = chunk_scan.sum_dtype(v)
  k, v = (chunk_scan.spread(x.astype(dtype), num_heads, x.ndim - 2) for x in (k, v))
  return k * v


def _read(q: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
  """q x, of all heads."""
  return (chunk_scan.spread(q.astype(x.dtype), x.shape[-2], q.ndim - 2) * x).astype(dtype)


@explicit.op("B T N")
def attend(
  q: Query,
  k: Key,
  v: Value,
  *,
  log_decay: Float[Array, "B T N H"],
  is_causal: bool = True,
  segment_ids: SegmentIds | None = None,
  implementation: str | None = None,
) -> Output:
  """q times the scan of k v; both ways, its own token once, where it is not causal."""
  N, H = _check(q, k, v, log_decay)
  b = _written(k, v, N)
  flat = functools.partial(jnp.reshape, shape=(*q.shape[:2], N * H))
  log_a = flat(log_decay.astype(b.dtype))

  def run(reverse):
    call = describe(flat(b), log_a, segment_ids=segment_ids, reverse=reverse)
    return _run(call, implementation)[0].reshape(b.shape)

  x = run(False)
  if not is_causal:
    x = x + (run(True) - b)  # its own token once
  return _read(q, x, v.dtype)


def reference(
  q: Query,
  k: Key,
  v: Value,
  *,
  log_decay: Float[Array, "B T N H"],
  is_causal: bool = True,
  segment_ids: SegmentIds | None = None,
  implementation: str | None = None,
) -> Output:
  """The recurrence token by token, in float32 (float64 for float64 inputs): the oracle."""
  del implementation
  B, T, N, H = log_decay.shape
  dtype = jnp.float64 if v.dtype == jnp.float64 else jnp.float32
  q, k, wide = (jnp.repeat(x.astype(dtype), N // x.shape[2], axis=2) for x in (q, k, v))
  b = (k * wide).reshape(B, T, N * H)
  call = describe(b, log_decay.reshape(b.shape), segment_ids=segment_ids)
  x = recurrence(call)[0]
  if not is_causal:
    x = x + recurrence(call._replace(reverse=True))[0] - b
  return (q * x.reshape(q.shape[:3] + (H,))).astype(v.dtype)


def init_state(
  batch: int,
  *,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  value_dim: int,
  max_length: int,
  dtype: Any = jnp.float32,
) -> DecodeState:
  """A past of nothing. It is float32 whatever `dtype` is, and no `max_length` bounds it."""
  del num_kv_heads, max_length, dtype
  if head_dim != value_dim:
    raise ValueError(f"value_dim must be head_dim, got {value_dim} and {head_dim}")
  return DecodeState(jnp.zeros((batch, num_heads, head_dim), jnp.float32))


def prefill(
  state: DecodeState,
  q: Query,
  k: Key,
  v: Value,
  *,
  log_decay: Float[Array, "B T N H"],
  lengths: Int[Array, " B"] | None = None,
) -> tuple[DecodeState, Output]:
  """Appends T tokens, or the first lengths[b] of row b; outputs of the others are 0."""
  N, H = _check(q, k, v, log_decay)
  b = _written(k, v, N)
  flat = functools.partial(jnp.reshape, shape=(*q.shape[:2], N * H))
  start = state.x.reshape(q.shape[0], N * H)
  log_a = flat(log_decay.astype(b.dtype))
  x, end = _run(describe(flat(b), log_a, initial_state=start, lengths=lengths))
  return DecodeState(end.reshape(state.x.shape)), _read(q, x.reshape(b.shape), v.dtype)


def step(
  state: DecodeState,
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K H"],
  *,
  log_decay: Float[Array, "B N H"],
) -> tuple[DecodeState, Float[Array, "B N H"]]:
  """One token: decay, write, read; the same cost after any past."""
  N, _ = _check(q, k, v, log_decay)
  x = jnp.exp(log_decay.astype(state.x.dtype)) * state.x + _written(k, v, N)
  return DecodeState(x), _read(q, x, v.dtype)


def cost(B: int, T: int, S: int, N: int, K: int, H: int, h: int) -> Cost:
  """What a causal forward pass costs in float32: two products and a sum a level, and both gates."""
  del S, h
  levels = (min(CHUNK, T) - 1).bit_length()
  flops = 3.0 * B * N * T * H * levels + 4.0 * B * N * T * H
  moved = 4.0 * B * T * H * (3 * N + 2 * K)
  return Cost(flops=flops, bytes=moved, state_bytes=4.0 * B * N * H)
