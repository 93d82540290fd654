"""Softmax attention: every query reads a weighted mean of the values, the weights a softmax over
the keys.

    out[t] = sum_s p[t, s] v[s]
    p[t, s] = exp(score[t, s] - lse[t])          lse[t] = log sum_s exp(score[t, s])
    score[t, s] = cap tanh(scale q[t] . k[s] / cap) + bias[t, s] - slope |t - s|
                  or -inf where the mask says no

Vaswani et al. 2017, equation 1, https://arxiv.org/abs/1706.03762; grouped queries, Ainslie et al.
2023, https://arxiv.org/abs/2305.13245; sinks, a learned score in each head's denominator that no
value belongs to, OpenAI 2025, https://arxiv.org/abs/2508.10925, section 2.2. A query that may
attend to nothing gives 0, log-sum-exp -inf and zero gradients, in every implementation.

O(T S (H + h)) time. Memory beyond the inputs and outputs: O(T S) for `reference` and `xla`, O(T +
S) for `tiled`, forward and backward. Decoding keeps the keys and values: all of them, or in a ring
the last `window`.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attention import cudnn, dispatch, explicit, flash, masks, scores, shapes, tiled
from attention.dispatch import Implementation
from attention.dropout import Dropout, kept_array
from attention.masks import Mask
from attention.scores import Modifiers
from attention.types import Cost, Key, LogSumExp, MaskArray, Output, Query, Value


class Call(NamedTuple):
  """A checked call, batched: what an implementation runs, and what it may object to."""

  query: Float[Array, "B T N H"]
  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K h"]
  mask: Mask
  modifiers: Modifiers
  sinks: Float[Array, " N"] | None
  scale: float
  logit_cap: float | None
  dropout: Dropout | None
  residual: bool
  """Whether the log-sum-exp is asked for, and so may be differentiated."""


@overload
def dot_product_attention(
  query: Query,
  key: Key,
  value: Value,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  mask: MaskArray | Mask | None = None,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  query_seq_lengths: Int[Array, " B"] | None = None,
  key_value_seq_lengths: Int[Array, " B"] | None = None,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  logit_cap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  alibi_slopes: Float[Array, " N"] | None = None,
  dropout: Dropout | None = None,
  implementation: str | None = None,
  return_residual: Literal[False] = False,
) -> Output: ...


@overload
def dot_product_attention(
  query: Query,
  key: Key,
  value: Value,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  mask: MaskArray | Mask | None = None,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  query_seq_lengths: Int[Array, " B"] | None = None,
  key_value_seq_lengths: Int[Array, " B"] | None = None,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  logit_cap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  alibi_slopes: Float[Array, " N"] | None = None,
  dropout: Dropout | None = None,
  implementation: str | None = None,
  return_residual: Literal[True],
) -> tuple[Output, LogSumExp]: ...


@explicit.op("B T N", "B T N", asked_by="return_residual")
def dot_product_attention(
  query: Query,
  key: Key,
  value: Value,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  mask: MaskArray | Mask | None = None,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  query_seq_lengths: Int[Array, " B"] | None = None,
  key_value_seq_lengths: Int[Array, " B"] | None = None,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  logit_cap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  alibi_slopes: Float[Array, " N"] | None = None,
  dropout: Dropout | None = None,
  implementation: str | None = None,
  return_residual: bool = False,
) -> Output | tuple[Output, LogSumExp]:
  """Softmax attention: `jax.nn.dot_product_attention` with the same names, order, layout and
  meaning, in O(T) memory.

  Beyond `jax.nn` it takes a `Mask`, a logit cap, sinks, ALiBi slopes and values of another width
  than the keys. It differs in two answers: a query that may attend to nothing gives 0 (there: the
  mean of all values), and the residual is float32 and has a gradient (there: the key's dtype, and
  none).

  Args:
    query: `B T N H`, or `T N H` without a batch; then so are key and value.
    key: `B S K H`; K divides N, and each key head serves N / K query heads in a row.
    value: `B S K h`.
    bias: added to the scores, broadcastable to `B N T S`; has a gradient.
    mask: who may attend to whom, a bool array broadcastable to `B N T S` (True: may) or a `Mask`,
      which costs no T x S memory and lets empty blocks be skipped.
    scale: of the dot products; None: H^-0.5. An array (a temperature that is learned) scales the
      queries instead.
    is_causal: only keys `s <= t`; `mask=causal(offset)` for another alignment.
    query_seq_lengths: int32; queries from there on are padding and give 0.
    key_value_seq_lengths: int32; keys from there on are padding and are not attended to.
    local_window_size: (left, right): `t - left <= s <= t + right`; an int is both sides. None
      leaves a side open.
    logit_cap: bounds the scaled dot products by a tanh.
    sinks: a score of each head that takes part in the softmax and has no value.
    alibi_slopes: of each head, >= 0: the score falls by slope |t - s|. See
      `attention.alibi_slopes`.
    dropout: which probabilities are dropped, from `attention.make_dropout`; the same ones in every
      implementation and sharding. The log-sum-exp is that of all of them.
    implementation: "hopper" and "tpu", kernels for these chips; "cudnn"; "tiled", in plain XLA;
      "xla", dense; "reference". None: the best that runs this call here, forward and backward (see
      `attention.explain`).
    return_residual: also return the log-sum-exp, `B T N` as in `jax.nn`, float32 (float64 for
      float64 inputs), natural logarithm, sinks included.

  Returns:
    `B T N h` in the dtype of value, or (that, the log-sum-exp).

  Raises:
    ValueError: shapes that do not fit each other, with both in the message.
    NotImplementedError: the named implementation cannot run this call, with the reason.
  """
  call = describe(
    query, key, value, bias, mask, scale=scale, is_causal=is_causal,
    query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
    local_window_size=local_window_size, logit_cap=logit_cap, sinks=sinks,
    alibi_slopes=alibi_slopes, dropout=dropout, return_residual=return_residual,
  )  # fmt: skip
  nothing = 0 in (*call.query.shape[:3], call.key.shape[1])
  out, lse = _nothing(call) if nothing else dispatch.run(implementation, IMPLEMENTATIONS, call)
  out = out[0] if np.ndim(query) == 3 else out
  if not return_residual:
    return out
  lse = lse.swapaxes(1, 2)
  return out, lse[0] if np.ndim(query) == 3 else lse


def _nothing(call: Call) -> tuple[Array, Array]:
  """Of a call without queries or without keys."""
  (B, T, N, _), h = call.query.shape, call.value.shape[3]
  dtype = jnp.float64 if call.query.dtype == jnp.float64 else jnp.float32
  sinks = jnp.full((N,), -jnp.inf, dtype) if call.sinks is None else call.sinks.astype(dtype)
  lse = jnp.broadcast_to(sinks[None, :, None], (B, N, T))
  return jnp.zeros((B, T, N, h), call.value.dtype), lse


def _reference(call: Call) -> tuple[Array, Array]:
  """The equation as it stands, in float32 (float64 for such inputs), every array T x S."""
  dtype = jnp.float64 if call.query.dtype == jnp.float64 else jnp.float32
  q, k, v = (x.astype(dtype) for x in call[:3])
  (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
  k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
  score = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * call.scale
  if call.logit_cap is not None:
    score = call.logit_cap * jnp.tanh(score / call.logit_cap)
  if call.modifiers.bias is not None:
    score = score + call.modifiers.bias.astype(score.dtype)
  if call.modifiers.alibi_slopes is not None:
    distance = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S)[None, :]).astype(score.dtype)
    slopes = call.modifiers.alibi_slopes.astype(score.dtype)
    score = score - slopes[None, :, None, None] * distance[None, None]
  score = jnp.where(call.mask.as_array(T, S), score, -jnp.inf)
  if call.sinks is not None:
    sink = call.sinks.astype(score.dtype)[None, :, None, None]
    score = jnp.concatenate([score, jnp.broadcast_to(sink, (*score.shape[:3], 1))], axis=-1)
  empty = (score == -jnp.inf).all(-1)
  score = jnp.where(empty[..., None], 0.0, score)
  lse = jax.nn.logsumexp(score, axis=-1)
  p = jnp.where(empty[..., None], 0.0, jax.nn.softmax(score, axis=-1))[..., :S]
  if call.dropout is not None:
    p = jnp.where(kept_array(call.dropout, T, S), p / (1.0 - call.dropout.rate), 0.0)
  out = jnp.einsum("bnts,bsnh->btnh", p, v, precision="highest")
  return out.astype(call.value.dtype), jnp.where(empty, -jnp.inf, lse)


def _dense(call: Call) -> tuple[Array, Array]:
  """All scores at once, as XLA's own matrix products and fusions; any derivative JAX knows."""
  q, k, v = call[:3]
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  grouped = q.reshape(B, T, K, N // K, H)
  product = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
  q_idx, k_idx = (jnp.arange(length, dtype=jnp.int32) for length in (T, S))
  score = scores.modify(
    product, call.modifiers, q_idx, k_idx, scale=call.scale, logit_cap=call.logit_cap
  )
  score = jnp.where(scores.grouped(call.mask.as_array(T, S), K), score, -jnp.inf)
  sink = None if call.sinks is None else call.sinks.astype(jnp.float32).reshape(1, K, N // K, 1)
  m = score.max(-1) if sink is None else jnp.maximum(score.max(-1), sink)
  m = jax.lax.stop_gradient(jnp.where(m == -jnp.inf, 0.0, m))
  p = jnp.exp(score - m[..., None])
  total = p.sum(-1) if sink is None else p.sum(-1) + jnp.exp(sink - m)
  empty = total == 0.0
  total = jnp.where(empty, 1.0, total)
  if call.dropout is not None:
    kept = scores.grouped(kept_array(call.dropout, T, S), K)
    p = jnp.where(kept, p / (1.0 - call.dropout.rate), 0.0)
  out = jnp.einsum("bkgts,bskh->btkgh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
  out = out / total.transpose(0, 3, 1, 2)[..., None]
  lse = jnp.where(empty, -jnp.inf, m + jnp.log(total))
  return out.reshape(B, T, N, -1).astype(v.dtype), lse.reshape(B, N, T)


def _tiled(call: Call) -> tuple[Array, Array]:
  rate, seeds = (call.dropout.rate, call.dropout.seeds) if call.dropout else (0.0, None)
  return tiled.attend(
    *call[:5],
    call.sinks,
    scale=call.scale,
    logit_cap=call.logit_cap,
    dropout_rate=rate,
    dropout_seeds=seeds,
  )


def _larger_than_a_tile(call: Call) -> str | None:
  T, S = call.query.shape[1], call.key.shape[1]
  limit = tiled.MAX_BLOCK
  if limit * limit >= T * S:
    return None
  return f"its T x S = {T} x {S} scores are more than the {limit} x {limit} of a tile"


def _double(call: Call) -> str | None:
  if jnp.float64 in (call.query.dtype, call.key.dtype, call.value.dtype):
    return "it computes in float32 and the inputs are float64"
  return None


def _oracle(call: Call) -> str | None:
  return None if _double(call) else "it is the oracle that the others are tested against"


def _on(chip: str) -> Implementation:
  run, refuse = functools.partial(flash.attend, chip), functools.partial(flash.unsupported, chip)
  return Implementation(run, refuse)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
  "hopper": _on("hopper"),
  "tpu": _on("tpu"),
  "cudnn": Implementation(cudnn.attend, cudnn.unsupported),
  "xla": Implementation(_dense, _double, automatic=_larger_than_a_tile),
  "tiled": Implementation(_tiled, _double),
  "reference": Implementation(_reference, lambda call: None, automatic=_oracle),
}


def describe(
  query: Query,
  key: Key,
  value: Value,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  mask: MaskArray | Mask | None = None,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  query_seq_lengths: Int[Array, " B"] | None = None,
  key_value_seq_lengths: Int[Array, " B"] | None = None,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  logit_cap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  alibi_slopes: Float[Array, " N"] | None = None,
  dropout: Dropout | None = None,
  return_residual: bool = False,
) -> Call:
  """Checks the arguments of `dot_product_attention` and puts them into the one form that
  implementations read.
  """
  query, key, value = shapes.batched(*(jnp.asarray(x) for x in (query, key, value)))
  (B, T, N, H), S = query.shape, key.shape[1]
  if logit_cap is not None:
    if isinstance(logit_cap, jax.core.Tracer):
      raise ValueError(f"logit_cap must be known before anything runs, not traced as {logit_cap}")
    shapes.check_positive("logit_cap", logit_cap)
    logit_cap = float(logit_cap)
  lengths = [_numbers(x, jnp.int32) for x in (query_seq_lengths, key_value_seq_lengths)]
  bias, sinks, alibi_slopes = (_numbers(x, jnp.float32) for x in (bias, sinks, alibi_slopes))
  for name, x, shape in (
    ("query_seq_lengths", lengths[0], (B,)),
    ("key_value_seq_lengths", lengths[1], (B,)),
    ("sinks", sinks, (N,)),
    ("alibi_slopes", alibi_slopes, (N,)),
    ("the seeds of dropout", dropout.seeds if dropout else None, (B, N)),
  ):
    if x is not None and x.shape != shape:
      raise ValueError(f"{name} must have shape {list(shape)}, not {list(x.shape)}")
  whole = shapes.call_mask(mask, is_causal, (B, N, T, S))
  if local_window_size is not None:
    sides = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    whole = whole & masks.sliding_window(*sides)
  if any(x is not None for x in lengths):
    whole = whole & masks.lengths(*lengths)
  if bias is not None:
    bias = shapes.broadcastable("bias", bias, (B, N, T, S))
  if isinstance(scale, jax.Array | np.ndarray):
    wide = query.astype(jnp.float64 if query.dtype == jnp.float64 else jnp.float32)
    query, scale = (wide * jnp.asarray(scale, wide.dtype)).astype(query.dtype), 1.0
  scale = H**-0.5 if scale is None else float(scale)
  modifiers = Modifiers(bias, alibi_slopes)
  dropout = dropout if dropout and dropout.rate else None
  return Call(
    query, key, value, whole, modifiers, sinks, scale, logit_cap, dropout, return_residual
  )


def _numbers(x: Any, dtype: Any) -> Array | None:
  """An array of what was given, `dtype` in place of any kind of integers; None stays None."""
  if x is None:
    return None
  x = jnp.asarray(x)
  return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.integer) else x


# As a Variant: causal or not, packed or not, with a window or a cap; and one token after another.


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K h"],
  *,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  window: int | None = None,
  logit_cap: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T N h"]:
  """Softmax attention of a sequence to itself; with a `window`, to the last `window` tokens, itself
  among them.
  """
  mask = masks.causal() if is_causal else masks.everything()
  if window is not None:
    if window < 1:
      raise ValueError(f"window must be at least 1, not {window}")
    mask = mask & masks.sliding_window(window - 1, 0 if is_causal else window - 1)
  if segment_ids is not None:
    mask = mask & masks.segments(segment_ids)
  return dot_product_attention(
    q, k, v, mask=mask, logit_cap=logit_cap, implementation=implementation
  )


def reference(q: Array, k: Array, v: Array, **options: Any) -> Float[Array, "B T N h"]:
  """`attend` by the equation: float32, O(T S) memory, the oracle."""
  return attend(q, k, v, implementation="reference", **options)


class State(NamedTuple):
  """The keys and values of what was read: position p lies in slot p mod capacity.

  With the capacity of the whole text nothing is overwritten; with that of a window the state is a
  ring. A state is full once it has wrapped: without a window the caller must give it room for all
  that will come. Heads come before slots, as the products of a step read them: nothing is turned.
  """

  key: Float[Array, "B K S H"]
  value: Float[Array, "B K S h"]
  length: Int[Array, " B"]
  """The number of tokens read, by row."""


def init_state(
  batch: int,
  *,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  value_dim: int,
  max_length: int,
  dtype: Any = jnp.float32,
  window: int | None = None,
  logit_cap: float | None = None,
) -> State:
  """A state that has read nothing, with room for `max_length` tokens, or for `window` where that is
  less.
  """
  del num_heads, logit_cap
  capacity = max_length if window is None else min(window, max_length)
  key, value = (jnp.zeros((batch, num_kv_heads, capacity, w), dtype) for w in (head_dim, value_dim))
  return State(key, value, jnp.zeros((batch,), jnp.int32))


def prefill(
  state: State,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K h"],
  *,
  lengths: Int[Array, " B"] | None = None,
  window: int | None = None,
  logit_cap: float | None = None,
  implementation: str | None = None,
) -> tuple[State, Float[Array, "B T N h"]]:
  """Reads T tokens after those that the state holds. Row b has `lengths[b]` of them, the rest is
  padding.
  """
  B, T = q.shape[:2]
  lengths = shapes.row_lengths(lengths, B, T)
  steps = jnp.arange(T, dtype=jnp.int32)[None]
  positions = state.length[:, None] + steps
  valid = steps < lengths[:, None]
  k_positions = jnp.concatenate([_slot_positions(state), jnp.where(valid, positions, -1)], axis=1)
  out = dot_product_attention(
    q,
    jnp.concatenate([state.key.swapaxes(1, 2).astype(k.dtype), k], axis=1),
    jnp.concatenate([state.value.swapaxes(1, 2).astype(v.dtype), v], axis=1),
    mask=masks.positions(positions, k_positions, window),
    logit_cap=logit_cap,
    implementation=implementation,
  )
  capacity = state.key.shape[2]
  kept = valid & (steps >= lengths[:, None] - capacity)
  slots = jnp.where(
    kept, positions % capacity, capacity
  )  # `capacity` is no slot: what goes there is dropped
  rows = jnp.arange(B)[:, None]
  key = state.key.at[rows, :, slots].set(k.astype(state.key.dtype), mode="drop")
  value = state.value.at[rows, :, slots].set(v.astype(state.value.dtype), mode="drop")
  return State(key, value, state.length + lengths), out


def step(
  state: State,
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K h"],
  *,
  window: int | None = None,
  logit_cap: float | None = None,
) -> tuple[State, Float[Array, "B N h"]]:
  """Reads one token: O(capacity) time."""
  rows = jnp.arange(q.shape[0])
  slots = state.length % state.key.shape[2]
  state = State(
    state.key.at[rows, :, slots].set(k.astype(state.key.dtype)),
    state.value.at[rows, :, slots].set(v.astype(state.value.dtype)),
    state.length + 1,
  )
  # XLA would fuse the write into what reads it, and copy the whole state to be able to.
  state = jax.lax.optimization_barrier(state)
  out = dot_product_attention(
    q[:, None],
    state.key.swapaxes(1, 2).astype(q.dtype),
    state.value.swapaxes(1, 2).astype(q.dtype),
    mask=masks.positions(state.length[:, None] - 1, _slot_positions(state), window),
    logit_cap=logit_cap,
    implementation="reference" if q.dtype == jnp.float64 else "xla",
  )
  return state, out[:, 0]


def _slot_positions(state: State) -> Int[Array, "B S"]:
  """The position of the token in each slot: the last one read that belongs there, or -1 where there
  is none.
  """
  slots = jnp.arange(state.key.shape[2], dtype=jnp.int32)[None]
  last = state.length[:, None] - 1
  return jnp.maximum(last - (last - slots) % state.key.shape[2], -1)


def cost(
  B: int,
  T: int,
  S: int,
  N: int,
  K: int,
  H: int,
  h: int,
  *,
  itemsize: int = 4,
  window: int | None = None,
  logit_cap: float | None = None,
) -> Cost:
  """Causal attention of T queries to S keys that end together."""
  del logit_cap
  first = np.arange(S - T, S, dtype=np.float64) + 1  # keys that each query sees
  pairs = np.minimum(first, np.inf if window is None else window).sum()
  kept = S if window is None else min(S, window)
  moved = B * (T * N * (H + h) + S * K * (H + h))
  return Cost(
    2.0 * B * N * pairs * (H + h), float(moved * itemsize), float(B * kept * K * (H + h) * itemsize)
  )
