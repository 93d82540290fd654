"""Linear attention in chunks of C tokens, some chunks at a time, and its own backward pass.

    P = (Q K^T) * exp(between)      inside the chunk, from j to i >= j
    O = P V + (Q * exp(prefix)) S                 S' = exp(total) S + (K * exp(suffix))^T V

`attention/chunks.py` has the decays. G chunks are a group: what is inside a chunk is computed for
all of them at once, as if they were rows of the batch, and only states go from one to the next. The
chunks of a row stand beside each other, so that a mesh may cut the batch. The backward pass keeps
the inputs, and the states that enter the groups where these are few beside them; else it runs the
states forward once more. It walks back over the groups, each recomputed from the state that enters
it and differentiated there and then. That is plain JAX, so it differentiates again.

The layout inside a chunk is head-major, [BG N C width], and every buffer of the loop is used again
for the next group: on a CPU the working set of a group stays in cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention import chunks, products
from attention.feature_maps import FeatureMap

GROUP = 8
"""Chunks of a group, at most, and ..."""
_GROUP_ELEMENTS = 2**17
"""... numbers of one of its arrays, all heads together: half a MiB, and some twenty are alive."""
_KEPT_STATES = 1 / 8
"""The states that enter groups are kept for the backward pass up to this part of q, k and v."""


class State(NamedTuple):
  """What the past leaves behind, float32 (float64 for float64 inputs)."""

  kv: Float[Array, "B N M h"]
  """Decayed sum of phi(k) v^T."""
  z: Float[Array, "B N M"]
  """Decayed sum of phi(k); stays as it was without `normalize`."""


class Rule(NamedTuple):
  """What is static in a chunk."""

  num_heads: int
  dtype: Any  # of every sum
  normalize: bool
  scale: float
  precision: lax.Precision


class Tokens(NamedTuple):
  """The differentiable inputs of a group's tokens, [BG C heads width]."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  g: jax.Array | None


class Marks(NamedTuple):
  """The integers of a group's tokens."""

  positions: jax.Array
  keep: jax.Array | None  # [BG C], False where a token is padding
  runs: jax.Array | None  # [BG C], the number of the token's document
  before: jax.Array | None  # [BG], of the document active before the chunk


class _Terms(NamedTuple):
  """A group's tokens as states see them, [BG N C width], and how these fade across a chunk."""

  k: jax.Array
  v: jax.Array
  g: jax.Array | None
  masks: chunks.RunMasks | None
  read: jax.Array | float  # of the state that enters, when token i reads it
  write: jax.Array | float  # of token j's write, when the state leaves
  carry: jax.Array | float  # of the state that enters, when the state leaves


def spread(x: jax.Array, num_heads: int, axis: int) -> jax.Array:
  """Every head along `axis` repeated, neighbors together, until there are `num_heads`."""
  return jnp.repeat(x, num_heads // x.shape[axis], axis=axis)


def _head_major(x: jax.Array, num_heads: int) -> jax.Array:
  """[BG C K W] -> [BG N C W], every head repeated for the output heads that read it."""
  return spread(jnp.swapaxes(x, 1, 2), num_heads, 1)


def _terms(rule: Rule, phi: FeatureMap, x: Tokens, marks: Marks) -> _Terms:
  k = _head_major(
    phi(x.k.astype(rule.dtype), positions=marks.positions, is_query=False), rule.num_heads
  )
  v = _head_major(x.v.astype(rule.dtype), rule.num_heads)
  g = None if x.g is None else jnp.swapaxes(x.g.astype(rule.dtype), 1, 2)
  if marks.keep is not None:
    keep = marks.keep[:, None, :, None]
    k, v = jnp.where(keep, k, 0), jnp.where(keep, v, 0)
    g = None if g is None else jnp.where(keep, g, 0)
  read = write = carry = 1.0
  if g is not None:
    read, write, carry = (jnp.exp(x) for x in chunks.decay_sums(g))
  masks = None
  if marks.runs is not None and marks.before is not None:
    masks = chunks.run_masks(marks.runs, marks.before)
    read = jnp.where(masks.entering, read, 0.0)
    write = jnp.where(masks.leaving, write, 0.0)
    carry = jnp.where(masks.whole, carry, 0.0)
  return _Terms(k, v, g, masks, read, write, carry)


def _states(rule: Rule, state: State, x: _Terms) -> tuple[State, State]:
  """The state after a group, and those that enter its chunks, [BG ...]."""
  B = state.kv.shape[0]
  in_order = lambda x: jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 0)
  k = x.k * x.write
  kv = products.transposed_times(k, x.v, rule.precision)
  new = in_order(kv), in_order(jnp.sum(k, axis=2)) if rule.normalize else None
  carry = None if isinstance(x.carry, float) else in_order(x.carry)

  def chunk(state, x):
    (new_kv, new_z), carry = x
    kv, z = state
    if carry is not None:
      kv, z = kv * jnp.swapaxes(carry, -1, -2), z * carry[:, :, 0, :]
    return State(kv + new_kv, state.z if new_z is None else z + new_z), state

  state, entering = lax.scan(chunk, state, (new, carry), unroll=True)
  return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), entering)


def _scores(rule: Rule, q: jax.Array, x: _Terms) -> jax.Array:
  """P_ij, what token i reads of token j's write: [BG N C C]."""
  causal = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))[None, None]
  allowed = causal if x.masks is None else causal & x.masks.same
  if x.g is not None and x.g.shape[-1] > 1:
    return jnp.where(allowed, chunks.decayed_scores(q, x.k, x.g, rule.precision), 0)
  scores = products.times_transposed(q, x.k, rule.precision)
  if x.g is None:
    return jnp.where(allowed, scores, 0)
  # The exponent is masked, not the product: exp(-inf) is 0 with a gradient of 0.
  return scores * jnp.exp(jnp.where(allowed, chunks.decay_between(x.g), -jnp.inf))


def _read(rule: Rule, state: State, q: jax.Array, x: _Terms) -> jax.Array:
  """The outputs of a group, from the states that enter its chunks: [BG N C h]."""
  scores, q = _scores(rule, q, x), q * x.read
  out = products.times(scores, x.v, rule.precision)
  out = out + products.times(q, state.kv, rule.precision)
  if not rule.normalize:
    return out * rule.scale
  weight = jnp.sum(scores, axis=-1) + jnp.einsum(
    "bncm,bnm->bnc", q, state.z, precision=rule.precision
  )
  return divide(out, weight[..., None])


@jax.custom_jvp
def divide(x: jax.Array, weight: jax.Array) -> jax.Array:
  """x / weight, and 0 with zero gradient where the weight is 0.

  No weight is squared: of one below 1e-19 or above 1e19 float32 holds no square.
  """
  something = weight != 0
  return jnp.where(something, x / jnp.where(something, weight, 1), 0)


@divide.defjvp
def _divide_derivative(primals, tangents):
  (x, weight), (dx, d_weight) = primals, tangents
  out = divide(x, weight)
  return out, divide(dx - out * d_weight, weight)


def _group(
  rule: Rule, phi: FeatureMap, state: State, x: Tokens, marks: Marks
) -> tuple[State, jax.Array]:
  """One group: (state after, outputs [BG C N h])."""
  # Copied in one piece: the axes are turned in cache then, which is quicker (BUILD_NOTES.md).
  x = jax.tree.map(products.settled, x)
  terms = _terms(rule, phi, x, marks)
  q = _head_major(
    phi(x.q.astype(rule.dtype), positions=marks.positions, is_query=True), rule.num_heads
  )
  state, entering = _states(rule, state, terms)
  out = jnp.swapaxes(_read(rule, entering, q, terms), 1, 2)
  return state, out.astype(x.v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
  rule: Rule, phi: FeatureMap, state: State, xs: Tokens, marks: Marks
) -> tuple[State, jax.Array]:
  """All groups, [groups BG C ...]; the backward pass is `_scan_backward`."""
  return lax.scan(lambda state, x: _group(rule, phi, state, *x), state, (xs, marks))


def _scan_forward(rule, phi, state, xs, marks):
  size = lambda *arrays: sum(x.size * x.dtype.itemsize for x in arrays)
  few = size(*state) * len(xs.q) <= _KEPT_STATES * size(xs.q, xs.k, xs.v)

  def group(entering, x):
    leaving, out = _group(rule, phi, entering, *x)
    return leaving, (out, entering if few else None)

  leaving, (out, entering) = lax.scan(group, state, (xs, marks))
  return (leaving, out), (phi, state, entering, xs, marks)


def _scan_backward(rule, saved, gradients):
  """The groups backward, each recomputed from the state that enters it."""
  phi, state, entering, xs, marks = saved
  d_state, d_out = gradients

  if entering is None:
    again = lambda state, x: (_states(rule, state, _terms(rule, phi, *x))[0], state)
    _, entering = lax.scan(again, state, (xs, marks))

  def backward(carry, x):
    d_state, d_phi = carry
    state, tokens, marks, d_out = x
    _, pull = jax.vjp(lambda p, s, x: _group(rule, p, s, x, marks), phi, state, tokens)
    d_phi_here, d_state, d_tokens = pull((d_state, products.settled(d_out)))
    learned = lambda total, here: total if here.dtype == jax.dtypes.float0 else total + here
    return (d_state, jax.tree.map(learned, d_phi, d_phi_here)), d_tokens

  carry = (d_state, jax.tree.map(jnp.zeros_like, phi))
  (d_state, d_phi), d_xs = lax.scan(backward, carry, (entering, xs, marks, d_out), reverse=True)
  d_phi = jax.tree.map(lambda d: d if jnp.issubdtype(d.dtype, jnp.inexact) else None, d_phi)
  return d_phi, d_state, d_xs, None


scan.defvjp(_scan_forward, _scan_backward)


def sum_dtype(x: jax.Array) -> Any:
  """The type that sums are made in for inputs like x: float32, or float64 for float64."""
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def group_size(T: int, chunk_size: int, numbers: int) -> int:
  """G for T tokens, where the largest array of one chunk has so many numbers. Fewer chunks are
  nothing but padding than there are groups.
  """
  chunks = max(1, -(-T // chunk_size))
  groups = -(-chunks // max(1, min(GROUP, _GROUP_ELEMENTS // numbers)))
  return -(-chunks // groups)


def cut(x: jax.Array, chunk_size: int, group: int = 1, mode: str = "constant") -> jax.Array:
  """[B T ...] -> [groups BG C ...], the last group padded."""
  B, T = x.shape[:2]
  x = jnp.pad(x, [(0, 0), (0, -T % (group * chunk_size))] + [(0, 0)] * (x.ndim - 2), mode=mode)
  x = jnp.moveaxis(x.reshape(B, -1, group, chunk_size, *x.shape[2:]), 0, 1)
  return x.reshape(-1, B * group, chunk_size, *x.shape[4:])


def join(x: jax.Array, batch: int) -> jax.Array:
  """[groups BG C ...] -> [B T ...], padding included."""
  x = x.reshape(x.shape[0], batch, -1, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0).reshape(batch, -1, *x.shape[4:])


def full_decay(g: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
  """A log decay [N], [B T N] or [B T N M] as [B T N 1] or [B T N M], for `shape` = (B, T, N)."""
  if g is None or g.ndim == 4:
    return g
  return jnp.broadcast_to(g[None, None], shape)[..., None] if g.ndim == 1 else g[..., None]


def begins(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
  """Which tokens begin another document than the token before."""
  return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])


def number_runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """The number of each token's document, from 0."""
  return chunks.number_runs(begins(segment_ids))


def real_tokens(T: int, lengths: Int[Array, " B"]) -> Bool[Array, "B T"]:
  """Which tokens are not padding; lengths may be integers of any size."""
  return jnp.arange(T, dtype=jnp.int32)[None] < lengths.astype(jnp.int32)[:, None]


def make_marks(
  shape: tuple[int, int],
  chunk_size: int,
  group: int,
  positions: jax.Array | None,
  lengths: jax.Array | None,
  segment_ids: jax.Array | None,
) -> Marks:
  """Positions, padding and documents of every group, [groups BG C], for `shape` = (B, T)."""
  B, T = shape
  index = jnp.arange(T, dtype=jnp.int32)[None]
  keep = jnp.ones((1, T), bool) if lengths is None else real_tokens(T, lengths)
  runs = before = None
  if segment_ids is not None:
    runs = chunks.number_runs(begins(segment_ids) & keep)  # padding begins no document
    runs = cut(runs, chunk_size, group, mode="edge")
    last = join(runs[..., -1:], B)  # of each chunk, [B chunks]
    before = jnp.pad(last[:, :-1], [(0, 0), (1, 0)])
    before = cut(before, 1, group)[..., 0]
  positions = jnp.broadcast_to(index if positions is None else positions, (B, T))
  padded = lengths is not None or T % (group * chunk_size)
  keep = cut(jnp.broadcast_to(keep, (B, T)), chunk_size, group) if padded else None
  return Marks(cut(positions, chunk_size, group), keep, runs, before)
