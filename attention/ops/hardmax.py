"""Hard-max attention: every query reads the value of its best key, or the mean of its best keys.

    score[t, s] = q[t] . k[s]         best[t] = {s: score[t, s] = max over s of score[t, s]}
    out[t] = mean of v[s] over s in best[t]  (ties="average"),     v[max best[t]]  (ties="latest")

The limit of softmax attention as its scale grows; "average-hard" attention in Merrill et al. 2022,
section 4, https://arxiv.org/abs/2106.16213, and with heads of width 2 the memory of a machine in
Percepta 2026, https://www.percepta.ai/blog/can-llms-be-computers. Scores are added coordinate by
coordinate, every product rounded, so that ties mean the same everywhere (`attention.plane`). In
float32 they are exact where every product and sum is an integer up to 2^24: addresses on a
parabola, q = (a, 1), k = (2 i, -i^2), to 4096, or 8192 of them counted from their middle. Beyond
lie float64 (`jax.enable_x64`), or an address split into two heads. A query that may attend to
nothing gives 0.

The gradient is that of a function that is constant between jumps: none for q and k, and each value
receives what its readers do, ties sharing. `straight_through` lends q and k the gradient of the
softmax over a few best keys; `top_k_attention` is that softmax, with its true gradient.

O(T S (H + h)) time, O(T + S) memory for `tiled` and the kernels; O(T log^2 T) time, O(T) memory for
`bulk`, whose heads are of width 2. Where scores are exact, and slopes q_1 / q_2 that differ, differ
in float32, `bulk` finds the same winners. Elsewhere, on a round hull, it may take a key whose score
is less than the best by rounding: at most 2e-7 of its terms, if no slope underflows. Decoding keeps
the keys and values.

Of keys and queries that are NaN nothing is promised, but that no form reads a later token for them.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention import (
  direction_grid,
  dispatch,
  explicit,
  fenwick,
  hardmax_bulk,
  hardmax_levels,
  hardmax_tiled,
  masks,
  parts,
  plane,
  retrieved,
  shapes,
)
from attention.dispatch import Implementation
from attention.kv_cache import Cache as State
from attention.kv_cache import append, make_cache
from attention.masks import Mask
from attention.types import Cost, Key, MaskArray, Output, Query, Value

CROSSOVER = 2**12
"""From this length on `bulk` runs, in less than half of the time of `tiled` on two CPU cores
(BUILD_NOTES.md). Below it compiles for longer than it saves.
"""

KERNEL_CROSSOVER = 2**17
"""From this length on `bulk` runs even where a chip's kernel could: calculated, not measured
(BUILD_NOTES.md).
"""


class Winners(NamedTuple):
  """Which keys a query reads, `B T N`."""

  score: Float[Array, "*B T N"]
  """The greatest score, float32; -inf where there is no key."""
  count: Int[Array, "*B T N"]
  """How many keys have it."""
  last: Int[Array, "*B T N"]
  """The last of them; -1 where there is none."""


class Call(NamedTuple):
  """A checked call, batched: what an implementation runs, and what it may object to."""

  query: Float[Array, "B T N H"]
  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K h"]
  mask: Mask
  ties: str


@overload
def hardmax_attention(
  query: Query,
  key: Key,
  value: Value,
  mask: MaskArray | Mask | None = None,
  *,
  ties: str = "average",
  is_causal: bool = False,
  straight_through: float | None = None,
  candidates: int = 8,
  implementation: str | None = None,
  return_residual: Literal[False] = False,
) -> Output: ...


@overload
def hardmax_attention(
  query: Query,
  key: Key,
  value: Value,
  mask: MaskArray | Mask | None = None,
  *,
  ties: str = "average",
  is_causal: bool = False,
  straight_through: float | None = None,
  candidates: int = 8,
  implementation: str | None = None,
  return_residual: Literal[True],
) -> tuple[Output, Winners]: ...


@explicit.op("B T N", "B T N", asked_by="return_residual")
def hardmax_attention(
  query: Query,
  key: Key,
  value: Value,
  mask: MaskArray | Mask | None = None,
  *,
  ties: str = "average",
  is_causal: bool = False,
  straight_through: float | None = None,
  candidates: int = 8,
  implementation: str | None = None,
  return_residual: bool = False,
) -> Output | tuple[Output, Winners]:
  """Attention that looks at one place: the best key's value, or the mean of those that tie.

  Args:
    query: `B T N H`, or `T N H` without a batch; then so are key and value.
    key: `B S K H`; K divides N, and each key head serves N / K query heads in a row.
    value: `B S K h`.
    mask: who may attend to whom, a bool array broadcastable to `B N T S` (True: may) or a `Mask`.
    ties: of several best keys "average" reads the mean of the values, "latest" the last one's.
    is_causal: only keys `s <= t`.
    straight_through: a temperature, which may be traced. The output stays hard, and queries and
      keys get the gradient of softmax(score / temperature) over the `candidates` best keys; values
      get the hard one. None: queries and keys get none.
    candidates: how many keys compete in `straight_through`, as in `top_k_attention`.
    implementation: "hopper" or "tpu" (that chip's kernel; widths to 8, masks of positions), "bulk"
      (width 2, causal or unmasked), "tiled" or "reference". None: the fastest that runs this call
      (see `attention.explain`).
    return_residual: also return the `Winners`; they have no gradient.

  Returns:
    `B T N h` in the dtype of value, or (that, the winners).

  Raises:
    ValueError: shapes that do not fit each other, or unknown ties, with both in the message.
    NotImplementedError: the named implementation cannot run this call, with the reason.
  """
  call = describe(query, key, value, mask, ties=ties, is_causal=is_causal)
  if straight_through is not None:
    plane.check_count("candidates", candidates)
    shapes.check_positive("straight_through", straight_through)
  out, winners = dispatch.run(implementation, IMPLEMENTATIONS, call)
  # Winners whose scores are 0 and -0 tie: whose score it is must not show.
  winners = winners._replace(score=jnp.where(winners.score == 0, 0.0, winners.score))
  if straight_through is not None:
    soft, _ = retrieved.attend(
      call.query, call.key, jax.lax.stop_gradient(call.value), call.mask,
      top_k=candidates, scale=1 / straight_through,
    )  # fmt: skip
    out = out + (soft - jax.lax.stop_gradient(soft)).astype(out.dtype)
  out = out.astype(value.dtype)
  if query.ndim == 3:
    out, winners = jax.tree.map(lambda x: x[0], (out, winners))
  return (out, winners) if return_residual else out


@explicit.op("B T N", "B T N")
def top_k_attention(
  query: Query,
  key: Key,
  value: Value,
  mask: MaskArray | Mask | None = None,
  *,
  top_k: int,
  scale: float | None = None,
  is_causal: bool = False,
  implementation: str | None = None,
) -> tuple[Output, Float[Array, "*B T N"]]:
  """Softmax attention to the `top_k` best keys, and the part of the whole softmax that they hold.

  With its true gradient: that of a softmax over keys that stay the same ones. Faithful to softmax
  attention only where scores are sharp, which is what the second result says. O(T S) time for
  `scan`, O(T top_k^2 log^2 T) for `hulls` (`attention.hardmax_layers`); O((T + S) top_k) memory.

  The second result needs all scores, O(T S) time, in any form; where it is not used, `jax.jit` of
  `hulls` does not compute it.

  Args:
    query: `B T N H`, or `T N H` without a batch; then so are key and value.
    key: `B S K H`.
    value: `B S K h`.
    mask: as in `hardmax_attention`.
    top_k: how many keys; fewer where there are no more. Of equal ones the first, with `hulls` any.
    scale: of the dot products; None: H^-0.5.
    is_causal: only keys `s <= t`.
    implementation: "hulls" (width 2, causal or unmasked, `top_k` up to 256) or "scan". None: the
      fastest that runs this call (see `attention.explain`).

  Returns:
    `B T N h` in the dtype of value, and `B T N`, float32, from 0 (no key) to 1; no gradient.

  Raises:
    ValueError: shapes that do not fit each other, or `top_k` is less than 1.
    NotImplementedError: the named implementation cannot run this call, with the reason.
  """
  call = describe_top_k(query, key, value, mask, top_k=top_k, scale=scale, is_causal=is_causal)
  out, mass = retrieved.attend(**call._asdict(), implementation=implementation)
  out = out.astype(value.dtype)
  return (out[0], mass[0]) if query.ndim == 3 else (out, mass)


@explicit.op("B T N", "B T N")
def fenwick_attention(
  query: Query, key: Key, value: Value, *, recent: int = 32, scale: float | None = None
) -> tuple[Output, Int[Array, "*B T N C"]]:
  """Causal softmax attention of planar heads to the keys of a query's own block and the best one of
  each block of a power of two before it: `attention.fenwick`. O(T (log^2 T + recent)) time.

  With its true gradient, that of a softmax over these keys.

  Args:
    query: `B T N 2`, or `T N 2` without a batch; then so are key and value.
    key: `B T K 2`.
    value: `B T K h`.
    recent: keys in a block of the smallest size, a power of two from 16 on.
    scale: of the dot products; None: 2^-0.5.

  Returns:
    `B T N h` in the dtype of value, and which keys were looked at, int32 `B T N C`, -1 for none:
    with `softmax_mass`, what part of the whole softmax they hold.

  Raises:
    ValueError: shapes that do not fit each other, or `recent` is not such a number.
    NotImplementedError: heads of another width, or T is not S.
  """
  call = describe(query, key, value, is_causal=True)
  if reason := _planar(call):
    raise NotImplementedError(f"fenwick_attention cannot run this call: {reason}")
  if recent < hardmax_levels.WIDTH or recent & (recent - 1):
    raise ValueError(f"recent must be a power of two, at least 16, not {recent}")
  q, k, v = _widened(call)
  index = fenwick.candidates(q, k, recent=recent)
  out, _ = retrieved.softmax_over(q, k, v, index, scale=2**-0.5 if scale is None else scale)
  out = out.astype(value.dtype)
  return (out[0], index[0]) if query.ndim == 3 else (out, index)


@explicit.op("B T N")
def softmax_mass(
  query: Query, key: Key, index: Int[Array, "*B T N C"], *, scale: float | None = None
) -> Float[Array, "*B T N"]:
  """What part of the causal softmax over all keys the keys at `index` hold: O(T S) time."""
  call = describe(query, key, key, is_causal=True)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  best = retrieved.Call(*_widened(call), call.mask, 1, scale)
  index = index if index.ndim == 4 else index[None]
  _, lse = dispatch.run("scan", retrieved.IMPLEMENTATIONS, best)
  mass = retrieved.softmax_over(*best[:3], index, lse, scale=scale)[1]
  return mass[0] if query.ndim == 3 else mass


@explicit.op("B T N", "B T N")
def direction_grid_attention(
  query: Query, key: Key, value: Value, *, cells: int = 16
) -> tuple[Output, Int[Array, "*B T N"]]:
  """Causal hard-max attention of heads of width 3 by the winners of a fixed grid of directions.

  Of the best score at most `direction_grid.error(cells)` times |q| times the distance of two keys
  is lost. O(T cells^2) time and a state of 6 cells^2 keys. See `attention.direction_grid`.

  Args:
    query: `B T N 3`, or `T N 3` without a batch; then so are key and value.
    key: `B T K 3`.
    value: `B T K h`.
    cells: n, of the grid on each face of the cube.

  Returns:
    `B T N h` in the dtype of value, and which key was read, int32 `B T N`, -1 for none.

  Raises:
    ValueError: shapes that do not fit each other, or no cells.
    NotImplementedError: heads of another width, or T is not S.
  """
  call = describe(query, key, value, is_causal=True)
  plane.check_count("cells", cells)
  (T, H), S = (call.query.shape[i] for i in (1, 3)), call.key.shape[1]
  if H != 3 or T != S:
    raise NotImplementedError(f"a grid of directions needs H = 3 and T = S, not {H}, {T} and {S}")
  q, k, _ = _widened(call)
  index = direction_grid.winners(q, k, cells=cells)
  out = jnp.where(index[..., None] < 0, 0, parts.read(call.value, index))
  return (out[0], index[0]) if query.ndim == 3 else (out, index)


def nearest_key_attention(
  query: Query, key: Key, value: Value, mask: MaskArray | Mask | None = None, **options: Any
) -> Any:
  """Attention to the nearest key: hard-max attention of lifted vectors.

      argmin_s |q - k_s|^2 = argmax_s (q, 1) . (2 k_s, -|k_s|^2)

  Keys on a line become points of a parabola, of width 2, which `bulk` runs in O(T log^2 T). Takes
  the options of `hardmax_attention`.

  In float32, or float64 if they are that. Exact for integers: in float32 up to 4096 in magnitude on
  a line, for vectors no longer than 2364 in a space; elsewhere but for rounding of |q|^2 and |k|^2.
  """
  shapes.batched(query, key, value)
  found = hardmax_attention(*lift(query, key), _wide(value), mask, **options)
  narrow = lambda out: out.astype(value.dtype)
  return (narrow(found[0]), found[1]) if isinstance(found, tuple) else narrow(found)


def lift(
  query: Float[Array, "*T H"], key: Float[Array, "*S H"]
) -> tuple[Float[Array, "*T H+1"], Float[Array, "*S H+1"]]:
  """(q, 1) and (2 k, -|k|^2), whose product is |q|^2 - |q - k|^2: float32, or float64 as they are,
  for in half precision a square is no longer that of its number.
  """
  query, key = _wide(query), _wide(key)
  square = -(key * key).sum(-1, keepdims=True)
  one = jnp.ones((*query.shape[:-1], 1), query.dtype)
  return jnp.concatenate([query, one], -1), jnp.concatenate([2 * key, square], -1)


def _widened(call: Call) -> tuple[Array, Array, Array]:
  """In float32, or float64 if they are that."""
  return _wide(call.query), _wide(call.key), _wide(call.value)


def _wide(x: Array) -> Array:
  return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _reference(call: Call) -> tuple[Array, Winners]:
  """The equation as it stands, every array T x S."""
  q, k, v = _widened(call)
  (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
  k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
  q, k = (jax.lax.stop_gradient(x).swapaxes(1, 2) for x in (q, k))
  score = jnp.where(call.mask.as_array(T, S), plane.scores(q, k), -jnp.inf)
  most = score.max(-1, keepdims=True, initial=-jnp.inf)
  best = (score == most) & (score > -jnp.inf)
  count = best.sum(-1, dtype=jnp.int32)
  last = jnp.where(best, jnp.arange(S, dtype=jnp.int32), -1).max(-1, initial=-1)
  if call.ties == "latest":
    best = jnp.arange(S, dtype=jnp.int32)[None, None, None] == last[..., None]
  weight = best.astype(v.dtype) / jnp.maximum(best.sum(-1, keepdims=True), 1).astype(v.dtype)
  out = jnp.einsum("bnts,bsnh->btnh", weight, v, precision="highest")
  winners = Winners(most[..., 0].astype(jnp.float32), count, last)
  return out, jax.tree.map(lambda x: x.swapaxes(1, 2), winners)


def _tiled(call: Call, chip: str | None = None) -> tuple[Array, Winners]:
  out, winners = hardmax_tiled.attend(*_widened(call), call.mask, ties=call.ties, chip=chip)
  return out, Winners(winners.score.astype(jnp.float32), winners.count, winners.last)


def _bulk(call: Call) -> tuple[Array, Winners]:
  q, k, v = _widened(call)
  causal = call.mask == masks.causal()
  out, winners = hardmax_bulk.attend(q, k, v, ties=call.ties, causal=causal)
  best = parts.read(jax.lax.stop_gradient(k), winners.last)
  score = plane.score(*((x[..., 0], x[..., 1]) for x in (jax.lax.stop_gradient(q), best)))
  score = jnp.where(winners.count > 0, score, -jnp.inf)
  return out, Winners(score.astype(jnp.float32), winners.count, winners.last)


def _planar(call: Call) -> str | None:
  return hardmax_levels.unsupported(call.query, call.key, call.mask)


def _length(call: Call) -> int:
  """Of the square call that compares as this one does: T S for a scan with T + S for `bulk`."""
  T, S = call.query.shape[1], call.key.shape[1]
  return 2 * T * S // max(T + S, 1)


def _short(call: Call) -> str | None:
  length = _length(call)
  return f"up to {CROSSOVER} tokens tiles are faster: {length}" if length < CROSSOVER else None


def _empty(call: Call) -> str | None:
  (B, T), S = call.query.shape[:2], call.key.shape[1]
  return f"there is no tile: B={B}, T={T}, S={S}" if 0 in (B, T, S) else None


def _long(call: Call) -> str | None:
  length = _length(call)
  if length < KERNEL_CROSSOVER or _planar(call):
    return None
  return f"from {KERNEL_CROSSOVER} tokens on 'bulk' has less to do: {length}"


def _by_kernel(chip: str) -> Implementation:
  unsupported = lambda call: _empty(call) or hardmax_tiled.unsupported(chip, call)
  return Implementation(functools.partial(_tiled, chip=chip), unsupported, automatic=_long)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
  "hopper": _by_kernel("hopper"),
  "tpu": _by_kernel("tpu"),
  "bulk": Implementation(_bulk, _planar, automatic=_short),
  "tiled": Implementation(_tiled, _empty),
  "reference": Implementation(_reference, lambda call: None),
}


def describe(
  query: Query,
  key: Key,
  value: Value,
  mask: MaskArray | Mask | None = None,
  *,
  ties: str = "average",
  is_causal: bool = False,
  **options: Any,
) -> Call:
  """Checks the arguments of `hardmax_attention` and puts them into the one form that
  implementations read.
  """
  del options
  query, key, value = shapes.batched(query, key, value)
  plane.check_ties(ties)
  (B, T, N, _), S = query.shape, key.shape[1]
  return Call(query, key, value, shapes.call_mask(mask, is_causal, (B, N, T, S)), ties)


def describe_top_k(
  query: Query,
  key: Key,
  value: Value,
  mask: MaskArray | Mask | None = None,
  *,
  top_k: int,
  scale: float | None = None,
  is_causal: bool = False,
) -> retrieved.Call:
  """`describe`, of the arguments of `top_k_attention`."""
  call = describe(query, key, value, mask, is_causal=is_causal)
  plane.check_count("top_k", top_k)
  scale = call.query.shape[3] ** -0.5 if scale is None else scale
  return retrieved.Call(*call[:4], top_k, scale)


OTHER_OPS = {"top_k_attention": (describe_top_k, retrieved.IMPLEMENTATIONS)}


# As a Variant: hard, or with `top_k` the softmax that trains; and one token after another.


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K h"],
  *,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  ties: str = "average",
  top_k: int | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T N h"]:
  """Hard-max attention of a sequence to itself; with `top_k`, softmax over that many best keys."""
  mask = masks.causal() if is_causal else masks.everything()
  if segment_ids is not None:
    mask = mask & masks.segments(segment_ids)
  if top_k is not None:
    form = "scan" if implementation == "reference" else implementation
    return top_k_attention(q, k, v, mask, top_k=top_k, scale=scale, implementation=form)[0]
  return hardmax_attention(q, k, v, mask, ties=ties, implementation=implementation)


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
  ties: str = "average",
  top_k: int | None = None,
  scale: float | None = None,
) -> State:
  """The state of no token, for up to `max_length` of them."""
  del num_heads, ties, top_k, scale
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
  lengths: Int[Array, " B"] | None = None,
  ties: str = "average",
  top_k: int | None = None,
  scale: float | None = None,
) -> tuple[State, Float[Array, "B T N h"]]:
  """Reads T tokens after those that the state holds. Row b has `lengths[b]` of them, the rest is
  padding. O(T max_length) time.
  """
  state, _, mask = append(state, k, v, lengths)
  key, value = state.key.astype(k.dtype), state.value.astype(v.dtype)
  if top_k is not None:
    return state, top_k_attention(q, key, value, mask, top_k=top_k, scale=scale)[0]
  return state, hardmax_attention(q, key, value, mask, ties=ties)


def step(
  state: State,
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K h"],
  *,
  ties: str = "average",
  top_k: int | None = None,
  scale: float | None = None,
) -> tuple[State, Float[Array, "B N h"]]:
  """Reads one token: one pass over the cache, O(max_length) time."""
  if top_k is not None:
    qkv = (x[:, None] for x in (q, k, v))
    state, out = prefill(state, *qkv, top_k=top_k, scale=scale)
    return state, out[:, 0]
  plane.check_ties(ties)
  state, _, _ = append(state, k[:, None], v[:, None], None)
  (B, N, H), (S, K) = q.shape, state.key.shape[1:3]
  query, key = _wide(q), _wide(state.key)
  score = plane.scores(query.reshape(B, K, N // K, H), key.swapaxes(1, 2))
  slots = jnp.arange(S, dtype=jnp.int32)[None, None, None]
  score = jnp.where(slots < state.length[:, None, None, None], score, -jnp.inf)
  tied = (score == score.max(-1, keepdims=True)) & (score > -jnp.inf)
  return state, _read(tied, state.value, ties).reshape(B, N, -1).astype(v.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _read(tied: jax.Array, value: jax.Array, ties: str) -> jax.Array:
  """The values `B K G h` of the slots that are tied, `B K G S`, in float32 at the least; `value`,
  `B S K h`, is the cache.
  """
  slots, value = jnp.arange(tied.shape[3], dtype=jnp.int32), value.swapaxes(1, 2)
  last, count = jnp.where(tied, slots, 0).max(-1), tied.sum(-1, dtype=jnp.int32)

  def read():
    one = jnp.take_along_axis(value[:, :, None], last[..., None, None], axis=3)[:, :, :, 0]
    return jnp.where(count[..., None] > 0, _wide(one), 0)

  def average():
    total = jnp.einsum(
      "bkgs,bksh->bkgh", tied.astype(value.dtype), value, precision="highest",
      preferred_element_type=jnp.float64 if value.dtype == jnp.float64 else jnp.float32,
    )  # fmt: skip
    return total / jnp.maximum(count, 1)[..., None].astype(total.dtype)

  return jax.lax.cond(ties == "latest" or (count <= 1).all(), read, average)


def cost(
  B: int, T: int, S: int, N: int, K: int, H: int, h: int, *, itemsize: int = 4,
  ties: str = "average", top_k: int | None = None, scale: float | None = None,
) -> Cost:  # fmt: skip
  """Causal attention of T queries to S keys that end together, by a scan of all keys."""
  del ties, scale
  pairs = T * (S - (T - 1) / 2)
  moved = B * (T * N * (H + h) + S * K * (H + h))
  flops = 2.0 * B * N * (pairs * H + T * (top_k or 1) * h)
  return Cost(flops, float(moved * itemsize), float(B * S * K * (H + h) * itemsize))
