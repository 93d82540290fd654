"""Stochastic hard attention: every query draws one key from its softmax and reads that key's value.

    p[t, s] = softmax over s of scale q[t] . k[s]        s[t] ~ p[t, .]        out[t] = v[s[t]]

Xu et al. 2015, section 4.1, https://arxiv.org/abs/1502.03044. The draw is the argmax of log p + g,
g Gumbel noise that is an argument as the rest is: a function of one number per query and of the
distance to the key (`attention.gumbel`), so a call has no state and can be made again. Without that
number the output is the expected one, sum_s p[t, s] v[s], which is softmax attention.

Values receive what their readers do. Queries and keys have two estimators to learn by:

- `reinforce`, the paper's equations 11 to 13, unbiased: the log-likelihood of what the draws led
  to, less a moving average, times the gradient of the draws' log-probability, and the gradient of
  the entropy;
- `temperature`, straight-through Gumbel (Jang et al. 2017, https://arxiv.org/abs/1611.01144): the
  gradient of softmax((log p + g) / temperature) in place of that of the draw. Biased, less varied.

O(T S (H + h)) time; memory O(T S) for `reference` and O(T + S) for `rows`, forward and backward, a
few rows of scores at a time. Decoding keeps the keys and values.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention import dispatch, explicit, masks, shapes
from attention.dispatch import Implementation
from attention.gumbel import gumbel
from attention.kv_cache import Cache as State
from attention.kv_cache import append, make_cache
from attention.masks import Mask
from attention.types import Cost, MaskArray

_SCORES = 2**20
"""Scores that `rows` holds at once, all heads together."""


class Draws(NamedTuple):
  """What a loss needs to know of the draws, `B T N`."""

  index: Int[Array, "B T N"]
  """The key that was read; -1 where there is none."""
  log_prob: Float[Array, "B T N"]
  """The logarithm of its probability; has a gradient."""
  entropy: Float[Array, "B T N"]
  """Of p, nats; has a gradient."""


class Call(NamedTuple):
  """A checked call."""

  query: Float[Array, "B T N H"]
  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K h"]
  mask: Mask
  noise: Float[Array, "B T N"] | None
  positions: Int[Array, "#B T"]
  """Of the queries among the keys."""
  scale: float
  temperature: float | Array | None


@overload
def stochastic_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K h"],
  mask: MaskArray | Mask | None = None,
  *,
  noise: Float[Array, "B T N"] | None,
  temperature: float | Array | None = None,
  scale: float | None = None,
  is_causal: bool = False,
  positions: Int[Array, "#B T"] | None = None,
  implementation: str | None = None,
  return_draws: Literal[False] = False,
) -> Float[Array, "B T N h"]: ...


@overload
def stochastic_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K h"],
  mask: MaskArray | Mask | None = None,
  *,
  noise: Float[Array, "B T N"] | None,
  temperature: float | Array | None = None,
  scale: float | None = None,
  is_causal: bool = False,
  positions: Int[Array, "#B T"] | None = None,
  implementation: str | None = None,
  return_draws: Literal[True],
) -> tuple[Float[Array, "B T N h"], Draws]: ...


@explicit.op("B T N", "B T N", asked_by="return_draws")
def stochastic_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K h"],
  mask: MaskArray | Mask | None = None,
  *,
  noise: Float[Array, "B T N"] | None,
  temperature: float | Array | None = None,
  scale: float | None = None,
  is_causal: bool = False,
  positions: Int[Array, "#B T"] | None = None,
  implementation: str | None = None,
  return_draws: bool = False,
) -> Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Draws]:
  """Attention to one key, drawn from the softmax.

  Args:
    query: `B T N H`.
    key: `B S K H`; K divides N, and each key head serves N / K query heads in a row.
    value: `B S K h`.
    mask: who may attend to whom, a bool array broadcastable to `B N T S` (True: may) or a `Mask`;
      None: everybody.
    noise: uniform between 0 and 1, as from `jax.random.uniform`; None: the expected output.
    temperature: of straight-through Gumbel gradients for queries and keys; it may be traced. None:
      none through the output, as `reinforce` needs it.
    scale: of the dot products; None: H^-0.5.
    is_causal: only keys `s <= t`.
    positions: of the queries among the keys; None: 0, 1, ...
    implementation: "rows" or "reference"; None: "rows".
    return_draws: also return the `Draws`. Without noise their index is that of the likeliest key.

  Returns:
    `B T N h` in the dtype of value, 0 for a query that may attend to nothing; or (that, the draws).

  Raises:
    ValueError: shapes that do not fit each other, or a temperature that is not above 0.
  """
  call = describe(
    query, key, value, mask, noise=noise, temperature=temperature, scale=scale,
    is_causal=is_causal, positions=positions,
  )  # fmt: skip
  if 0 in (*query.shape[:3], key.shape[1]):
    out, draws = _nothing(call)
  else:
    out, draws = dispatch.run(implementation, IMPLEMENTATIONS, call)
  out = out.astype(value.dtype)
  return (out, draws) if return_draws else out


def reinforce(
  log_likelihood: Float[Array, " B"],
  draws: Draws,
  baseline: Float[Array, ""] | float,
  *,
  weight: float = 1.0,
  entropy_weight: float = 0.0,
) -> Float[Array, ""]:
  """A loss whose gradient is the paper's estimator, equation 13, negative: to be minimized.

      d log p(y | s) + weight (log p(y | s) - baseline) d log p(s) + entropy_weight d H

  Its mean over draws is that of the bound sum_s p(s) log p(y | s) on log p(y), with `weight` 1 and
  whatever the baseline, so long as that does not know the draws.

  Args:
    log_likelihood: of each row's targets given its draws.
    draws: their log-probabilities and entropies are summed over queries and heads.
    baseline: from `moving_average`; it only makes the estimate vary less.
    weight: lambda_r.
    entropy_weight: lambda_e, against draws that settle too early.
  """
  gain = jax.lax.stop_gradient(log_likelihood - baseline)
  rows = log_likelihood + weight * gain * draws.log_prob.sum((1, 2))
  return -(rows + entropy_weight * draws.entropy.sum((1, 2))).mean()


def moving_average(
  baseline: Float[Array, ""] | float, log_likelihood: Float[Array, " B"], *, keep: float = 0.9
) -> Float[Array, ""]:
  """The next baseline: b <- keep b + (1 - keep) mean log p(y | s), equation 12."""
  return jax.lax.stop_gradient(keep * baseline + (1 - keep) * log_likelihood.mean())


def _nothing(call: Call) -> tuple[Array, Draws]:
  """Of a call without queries or without keys."""
  shape = call.query.shape[:3]
  zero = jnp.zeros(shape, jnp.float64 if call.query.dtype == jnp.float64 else jnp.float32)
  out = jnp.zeros((*shape, call.value.shape[3]), call.value.dtype)
  return out, Draws(jnp.full(shape, -1, jnp.int32), zero, zero)


def _reference(call: Call) -> tuple[Array, Draws]:
  """The equation as it stands, every array T x S."""
  dtype = jnp.float64 if call.query.dtype == jnp.float64 else jnp.float32
  q, k, v = (x.astype(dtype) for x in call[:3])
  (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
  k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
  seen = call.mask.as_array(T, S)
  score = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * call.scale
  softmax = lambda x: jax.nn.softmax(jnp.where(seen, x, -1e30), axis=-1) * seen.astype(dtype)
  p = softmax(score)
  log_p = jnp.log(jnp.where(p > 0, p, 1.0))
  entropy = -(p * log_p).sum(-1)
  if call.noise is None:
    index, weight = jnp.where(seen, score, -jnp.inf).argmax(-1), p
  else:
    distance = call.positions[:, None, :, None] - jnp.arange(S, dtype=jnp.int32)[None, None, None]
    noisy = score + gumbel(call.noise.swapaxes(1, 2), distance).astype(dtype)
    index = jnp.where(seen, noisy, -jnp.inf).argmax(-1)
    weight = jnp.where(seen, jax.nn.one_hot(index, S, dtype=dtype), 0.0)
    if call.temperature is not None:
      soft = softmax(noisy / call.temperature)
      weight = weight + (soft - jax.lax.stop_gradient(soft))  # plus 0
  out = jnp.einsum("bnts,bsnh->btnh", weight, v, precision="highest")
  log_prob = jnp.take_along_axis(log_p, index[..., None], -1)[..., 0]
  index = jnp.where(seen.any(-1), index.astype(jnp.int32), -1)
  return out, jax.tree.map(lambda x: x.swapaxes(1, 2), Draws(index, log_prob, entropy))


def _rows(call: Call) -> tuple[Array, Draws]:
  """A few queries at a time, recomputed in the backward pass."""
  B, T, N, _ = call.query.shape
  S = call.key.shape[1]
  block = max(1, min(T, _SCORES // max(1, B * N * S)))
  count = -(-T // block)
  if count == 1:
    return _some_rows(call, jnp.arange(T, dtype=jnp.int32))
  one = jax.checkpoint(_some_rows)
  last = jnp.int32(T - 1)
  rows = lambda i: jnp.minimum(i * block + jnp.arange(block, dtype=jnp.int32), last)
  out = jax.lax.map(lambda i: one(call, rows(i)), jnp.arange(count, dtype=jnp.int32))
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, count * block, *x.shape[3:])[:, :T]
  return jax.tree.map(join, out)


def _some_rows(call: Call, rows: Int[Array, " q"]) -> tuple[Array, Draws]:
  dtype = jnp.float64 if call.query.dtype == jnp.float64 else jnp.float32
  k, v = call.key.astype(dtype), call.value.astype(dtype)
  B, S, K, _ = k.shape
  N, T = call.query.shape[2], rows.shape[0]
  q = call.query[:, rows].astype(dtype).reshape(B, T, K, N // K, -1)
  k_idx = jnp.arange(S, dtype=jnp.int32)
  seen = call.mask(rows, k_idx)
  seen = seen[:, None] if seen.shape[1] == 1 else seen.reshape(-1, K, N // K, T, S)
  score = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest") * call.scale
  score = jnp.where(seen, score, -jnp.inf)
  empty = ~seen.any(-1, keepdims=True)
  log_p = jnp.where(seen, jax.nn.log_softmax(jnp.where(empty, 0.0, score), axis=-1), 0.0)
  p = jnp.where(seen, jnp.exp(log_p), 0.0)
  noisy = score
  if call.noise is not None:
    noise = call.noise[:, rows].transpose(0, 2, 1).reshape(B, K, N // K, T)
    distance = call.positions[:, rows][:, None, None, :, None] - k_idx[None, None, None, None]
    noisy = jnp.where(seen, score + gumbel(noise, distance).astype(dtype), -jnp.inf)
  index = noisy.argmax(-1).astype(jnp.int32)
  hard = (k_idx[None, None, None, None] == index[..., None]) & seen
  weight = p
  if call.noise is not None:
    weight = hard.astype(dtype)
    if call.temperature is not None:
      soft = jax.nn.softmax(jnp.where(empty, 0.0, noisy / call.temperature), axis=-1)
      soft = jnp.where(seen, soft, 0.0)
      weight = weight + (soft - jax.lax.stop_gradient(soft))  # plus 0
  out = jnp.einsum("bkgts,bskh->btkgh", weight, v, precision="highest").reshape(B, T, N, -1)
  index = jnp.where(empty[..., 0], -1, index)
  draws = Draws(index, jnp.where(hard, log_p, 0.0).sum(-1), -(p * log_p).sum(-1))
  by_head = lambda x: jnp.moveaxis(x, 3, 1).reshape(B, T, N)
  return out, jax.tree.map(by_head, draws)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
  "rows": Implementation(_rows, lambda call: None),
  "reference": Implementation(_reference, lambda call: None),
}


def describe(
  query: Array,
  key: Array,
  value: Array,
  mask: MaskArray | Mask | None = None,
  *,
  noise: Array | None,
  temperature: float | Array | None = None,
  scale: float | None = None,
  is_causal: bool = False,
  positions: Array | None = None,
  **options: Any,
) -> Call:
  """Checks the arguments of `stochastic_attention` and returns the call as data."""
  del options
  shapes.agree(query, key, value)
  if noise is not None and noise.shape != query.shape[:3]:
    raise ValueError(f"noise must be [B, T, N] = {list(query.shape[:3])}, not {list(noise.shape)}")
  if temperature is not None:
    shapes.check_positive("temperature", temperature)
  (B, T, N, _), S = query.shape, key.shape[1]
  mask = shapes.call_mask(mask, is_causal, (B, N, T, S))
  if positions is None:
    positions = jnp.arange(T, dtype=jnp.int32)[None]
  elif positions.shape not in ((B, T), (1, T)):
    raise ValueError(
      f"positions must be [B, T] = {[B, T]} or {[1, T]}, not {list(positions.shape)}"
    )
  return Call(
    query, key, value, mask, noise, positions,
    query.shape[3] ** -0.5 if scale is None else scale, temperature,
  )  # fmt: skip


# As a Variant: straight-through where there is noise, the expected output where there is none.


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K h"],
  *,
  noise: Float[Array, "B T N"] | None = None,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  temperature: float | Array | None = 1.0,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T N h"]:
  """Stochastic hard attention of a sequence to itself."""
  mask = masks.causal() if is_causal else masks.everything()
  if segment_ids is not None:
    mask = mask & masks.segments(segment_ids)
  return stochastic_attention(
    q, k, v, mask, noise=noise, temperature=temperature, scale=scale, implementation=implementation
  )


def reference(q: Array, k: Array, v: Array, **options: Any) -> Float[Array, "B T N h"]:
  """`attend` by the equation: float32, O(T S) memory, the oracle."""
  return attend(q, k, v, implementation="reference", **options)


def init_state(
  batch: int,
  *,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  value_dim: int,
  max_length: int,
  dtype: Any = jnp.float32,
  temperature: float | None = 1.0,
  scale: float | None = None,
) -> State:
  """The state of no token, for up to `max_length` of them."""
  del num_heads, temperature, scale
  return make_cache(
    batch, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim,
    max_length=max_length, dtype=dtype,
  )  # fmt: skip


def prefill(
  state: State,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K h"],
  *,
  noise: Float[Array, "B T N"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  temperature: float | Array | None = 1.0,
  scale: float | None = None,
) -> tuple[State, Float[Array, "B T N h"]]:
  """Reads T tokens after those that the state holds, the first `lengths[b]` of row b."""
  state, positions, mask = append(state, k, v, lengths)
  key, value = state.key.astype(k.dtype), state.value.astype(v.dtype)
  return state, stochastic_attention(
    q, key, value, mask, noise=noise, positions=positions, temperature=temperature, scale=scale
  )


def step(
  state: State,
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K h"],
  *,
  noise: Float[Array, "B N"] | None = None,
  **options: Any,
) -> tuple[State, Float[Array, "B N h"]]:
  """Reads one token: O(max_length) time."""
  noise = None if noise is None else noise[:, None]
  state, out = prefill(state, *(x[:, None] for x in (q, k, v)), noise=noise, **options)
  return state, out[:, 0]


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
  temperature: float | None = 1.0,
  scale: float | None = None,
) -> Cost:
  """Causal attention of T queries to S keys that end together; of the values one row is read."""
  del temperature, scale
  pairs = T * (S - (T - 1) / 2)
  moved = B * (T * N * (H + h) + S * K * (H + h))
  flops = 2.0 * B * N * pairs * H
  return Cost(flops, float(moved * itemsize), float(B * S * K * (H + h) * itemsize))
