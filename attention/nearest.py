"""Decoding of heads that read the nearest key, where keys are numbers: O(32) a token, exactly.

    out[t] = v[argmin_s |q[t] - k[s]|]        a token inserts its key, then reads

What `nearest_key_attention` and a hull of the parabola's points (2 k, -k^2) compute, without the
square: integers are exact to 2^24, where the parabola ends at 4096. Keys are float32 read as
ordered integers, in a digital search tree (Coffman and Eve 1970,
https://doi.org/10.1145/362384.362386): a node holds a key, and its children those whose next bit is
0 and 1, so a path has 33 nodes at most.
A node also knows the greatest key to its left and the least to its right; of a query's path these
and its own keys hold both neighbors of the query. Loops over single numbers, for CPUs
(`attention.native`).

Equal keys are all read, and so are two that are as far on either side, in float32. Where keys are
the positions 0, 1, 2, ... themselves no tree is needed: `at_positions` is one gather.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from attention import native, parts, plane

_KEY, _ENTRY, _LEFT, _RIGHT, _BELOW, _BELOW_ENTRY, _ABOVE, _ABOVE_ENTRY = range(8)
_WIDTH = 8  # numbers in a node


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NearestState:
  """What a head has read, of C tokens and K key heads in B rows."""

  nodes: UInt[Array, " BK*(C+1)*8+8"]
  """Key (ordered bits), entry, left and right child (0 is none), the greatest key to the left, its
  entry, the least key to the right, its entry. Each head's lie together, the root first. The last
  one is nobody's.
  """
  used: Int[Array, " BK"]
  """The number of nodes of each head."""
  entries: Float[Array, " (C+1)*BK*w"]
  """What is read of each token and head, w = h + 1 numbers: the sum of the values of equal keys and
  their number, or the last one's value and 1. The last token's are nobody's.
  """
  length: Int[Array, " B"]
  """The number of tokens read, by row."""
  steps: Int[Array, ""]
  """The number of steps taken, padding included: the capacity bounds it."""
  ties: str = dataclasses.field(metadata={"static": True}, default="average")

  @property
  def heads(self) -> int:
    """B K."""
    return self.used.shape[0]

  @property
  def capacity(self) -> int:
    """C: tokens there is room for."""
    return (self.nodes.shape[0] // _WIDTH - 1) // self.heads - 1

  @property
  def head_dim(self) -> int:
    """H."""
    return 1

  @property
  def width(self) -> int:
    """h + 1."""
    return self.entries.shape[0] // (self.heads * (self.capacity + 1))


def init_state(
  batch: int,
  *,
  num_heads: int,
  num_kv_heads: int,
  value_dim: int,
  max_length: int,
  ties: str = "average",
) -> NearestState:
  """A state that has read nothing, with room for `max_length` tokens: 32 + 4 (h + 1) bytes a token
  and key head. Tokens beyond are not kept.

  Raises: ValueError: unknown ties, heads that do not divide, or more than int32 can number.
  """
  plane.check_ties(ties)
  if num_kv_heads < 1 or num_heads % num_kv_heads:
    raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
  heads, width = batch * num_kv_heads, value_dim + 1
  if max(_WIDTH, width) * (max_length + 2) * heads >= 2**31:
    raise ValueError(
      f"max_length={max_length} with {heads} key heads is more than int32 can number"
    )
  return NearestState(
    nodes=jnp.zeros(heads * (max_length + 1) * _WIDTH + _WIDTH, jnp.uint32),
    used=jnp.zeros(heads, jnp.int32),
    entries=jnp.zeros((max_length + 1) * heads * width, jnp.float32),
    length=jnp.zeros(batch, jnp.int32),
    steps=jnp.zeros((), jnp.int32),
    ties=ties,
  )


def prefill(
  state: NearestState,
  q: Float[Array, "B T N 1"],
  k: Float[Array, "B T K 1"],
  v: Float[Array, "B T K h"],
  *,
  lengths: Int[Array, " B"] | None = None,
) -> tuple[NearestState, Float[Array, "B T N h"]]:
  """Reads T tokens after those that the state holds, in one compiled loop. Row b has `lengths[b]`
  of them; the rest is padding, which takes room, and its outputs are 0.
  """
  native.check(state, q, k, v, "B T")
  return native.prefill(_step, state, q, k, v, lengths)


def step(
  state: NearestState,
  q: Float[Array, "B N 1"],
  k: Float[Array, "B K 1"],
  v: Float[Array, "B K h"],
) -> tuple[NearestState, Float[Array, "B N h"]]:
  """Reads one token, its own key included. Donate the state, or all of it is copied."""
  native.check(state, q, k, v, "B")
  return _step(state, q, k, v, jnp.ones(q.shape[:1], bool))


def at_positions(
  v: Float[Array, "B S K h"], q: Float[Array, "B T N"], length: Int[Array, " B"] | int
) -> Float[Array, "B T N h"]:
  """Where the keys are the positions 0 to length - 1: the value at the nearest one, in O(1).
  Halfway between two the even one's, as rounding does; 0 where there is none.
  """
  last = jnp.broadcast_to(jnp.asarray(length, jnp.int32), q.shape[:1])[:, None, None] - 1
  at = jnp.clip(jnp.round(q.astype(jnp.float32)), 0, 2**31 - 128).astype(jnp.int32)
  at = jnp.clip(at, 0, jnp.maximum(last, 0))  # not by a float, which would be another number
  return jnp.where((last >= 0)[..., None], parts.read(v, at), 0)


@jax.jit
def _step(
  state: NearestState, q: Array, k: Array, v: Array, valid: Array
) -> tuple[NearestState, Array]:
  (B, N, _), K = q.shape, k.shape[1]
  keep = jnp.repeat(valid & (state.steps < state.capacity), K)
  value = v.astype(jnp.float32).reshape(B * K, -1)
  new = jnp.concatenate([value, jnp.ones((B * K, 1), jnp.float32)], axis=1)
  state, merged = _insert_all(state, _ordered(k.reshape(-1)), keep)
  merged = None if state.ties == "latest" else merged[:, None]
  entries = native.entered(state.entries, state.steps, new, merged)
  state = dataclasses.replace(state, entries=entries)
  read = _query_all(state, q.reshape(-1).astype(jnp.float32), N // K, new.shape[1])
  out = jnp.where(valid[:, None, None], read.reshape(B, N, -1), 0.0).astype(v.dtype)
  length = state.length + valid.astype(jnp.int32)
  return dataclasses.replace(state, length=length, steps=state.steps + 1), out


def _ordered(x: Array) -> Array:
  """Unsigned integers in the order of float32 numbers, of which -0 is 0."""
  return plane.ordered_bits(jnp.where(x == 0, 0.0, x.astype(jnp.float32)))


def _bit(key: Array, depth: Array) -> Array:
  """Of 32, the first at depth 0; beyond the last there are only equal keys."""
  return (key >> (jnp.uint32(31) - jnp.minimum(depth, jnp.uint32(31)))) & 1 == 1


class _Sinking(NamedTuple):
  """A key on its way down."""

  nodes: native.Rows
  node: Array
  depth: Array
  used: Array
  merged: Array
  """The entry of a key that is equal, or -1."""
  done: Array


def _sink(ties: str, base: Array, key: Array, entry: Array, c: _Sinking) -> _Sinking:
  """The key meets a node."""
  array, at = c.nodes.written(), base + _WIDTH * c.node
  row = native.row(array, at, _WIDTH)
  empty = c.node == c.used
  row = jnp.where(empty, jnp.zeros_like(row), row)
  equal, right = (row[_KEY] == key) & ~empty, _bit(key, c.depth)
  stop = empty | equal
  child = jnp.where(right, row[_RIGHT], row[_LEFT])
  below = ~stop & ~right & ((row[_LEFT] == 0) | (key > row[_BELOW]))
  above = ~stop & right & ((row[_RIGHT] == 0) | (key < row[_ABOVE]))
  if ties == "latest":
    below, above = (
      now | (~stop & side & (key == row[place]))
      for now, side, place in ((below, ~right, _BELOW), (above, right, _ABOVE))
    )
  replaced = empty | equal if ties == "latest" else empty
  child = jnp.where(~stop & (child == 0), c.used.astype(jnp.uint32), child)
  row = jnp.stack([
    jnp.where(empty, key, row[_KEY]), jnp.where(replaced, entry, row[_ENTRY]),
    jnp.where(stop | right, row[_LEFT], child), jnp.where(stop | ~right, row[_RIGHT], child),
    jnp.where(below, key, row[_BELOW]), jnp.where(below, entry, row[_BELOW_ENTRY]),
    jnp.where(above, key, row[_ABOVE]), jnp.where(above, entry, row[_ABOVE_ENTRY]),
  ])  # fmt: skip
  merged = jnp.where(equal, row[_ENTRY].astype(jnp.int32), c.merged)
  return _Sinking(
    native.Rows(array, at, row),
    child.astype(jnp.int32),
    c.depth + 1,
    c.used + empty.astype(jnp.int32),
    merged,
    stop,
  )


def _insert_all(state: NearestState, key: Array, keep: Array) -> tuple[NearestState, Array]:
  """All keys into their heads' trees; and the entries that they merged with."""
  size, entry = _WIDTH * (state.capacity + 1), state.steps.astype(jnp.uint32)

  def one(head, carry):
    nodes, used, merged = carry
    c = _Sinking(
      nodes, jnp.int32(0), jnp.uint32(0), native.get(used, head), jnp.int32(-1),
      ~native.get(keep, head),
    )  # fmt: skip
    sink = functools.partial(_sink, state.ties, head * size, native.get(key, head), entry)
    c = lax.while_loop(lambda c: ~c.done, sink, c)
    return c.nodes, native.put(used, head, c.used), native.put(merged, head, c.merged)

  start = native.unwritten(state.nodes, _WIDTH), state.used, jnp.full_like(state.used, -1)
  nodes, used, merged = native.times(state.heads, one, start)
  return dataclasses.replace(state, nodes=nodes.written(), used=used), merged


class _Seeking(NamedTuple):
  """A query on its way down: the nearest keys so far on either side, and their entries or -1."""

  node: Array
  depth: Array
  below: tuple[Array, Array]
  above: tuple[Array, Array]
  done: Array


def _nearer(
  greater: bool, old: tuple[Array, Array], key: Array, entry: Array, there: Array
) -> tuple[Array, Array]:
  better = there & ((old[1] < 0) | ((key > old[0]) if greater else (key < old[0])))
  return jnp.where(better, key, old[0]), jnp.where(better, entry.astype(jnp.int32), old[1])


def _seek(state: NearestState, base: Array, query: Array, c: _Seeking) -> _Seeking:
  """The query meets a node."""
  row = native.row(state.nodes, base + _WIDTH * c.node, _WIDTH)
  right, key, entry = _bit(query, c.depth), row[_KEY], row[_ENTRY]
  below = _nearer(True, c.below, key, entry, key <= query)
  above = _nearer(False, c.above, key, entry, key >= query)
  below = _nearer(True, below, row[_BELOW], row[_BELOW_ENTRY], right & (row[_LEFT] != 0))
  above = _nearer(False, above, row[_ABOVE], row[_ABOVE_ENTRY], ~right & (row[_RIGHT] != 0))
  child = jnp.where(right, row[_RIGHT], row[_LEFT])
  done = (child == 0) | (key == query)
  return _Seeking(child.astype(jnp.int32), c.depth + 1, below, above, done)


def _query_all(state: NearestState, query: Array, group: int, w: int) -> Array:
  """What all queries read; `group` of them in a row read one key head."""
  heads, size, asks = state.heads, _WIDTH * (state.capacity + 1), query.shape[0]

  def one(ask, out):
    head = lax.div(ask, jnp.int32(group))
    q, nobody = native.get(query, ask), (jnp.uint32(0), jnp.int32(-1))
    done = native.get(state.used, head) == 0
    c = _Seeking(jnp.int32(0), jnp.uint32(0), nobody, nobody, done)
    seek = functools.partial(_seek, state, head * size, _ordered(q))
    c = lax.while_loop(lambda c: ~c.done, seek, c)
    gaps = [
      jnp.where(entry < 0, jnp.inf, jnp.abs(q - plane.from_ordered_bits(key)))
      for key, entry in (c.below, c.above)
    ]
    first = (c.below[1] >= 0) & (gaps[0] <= gaps[1])
    second = (c.above[1] >= 0) & (gaps[1] <= gaps[0]) & (c.above[1] != c.below[1])
    if state.ties == "latest":
      both = first & second
      first, second = (
        first & (~both | (c.below[1] > c.above[1])),
        second & (~both | (c.above[1] > c.below[1])),
      )
    for entry, read, fresh in ((c.below[1], first, True), (c.above[1], second, ~first)):
      start, width = (entry * heads + head) * w, jnp.where(read, w, 0)
      out = native.add(out, ask * w, state.entries, start, width, fresh)
    return out

  out = native.times(asks, one, native.unwritten(jnp.zeros(asks * w + 1, jnp.float32), 1))
  out = out.written()[:-1].reshape(asks, w)
  return out[:, :-1] / jnp.maximum(out[:, -1:], 1.0)
