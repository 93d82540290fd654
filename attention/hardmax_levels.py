"""The squares of causal attention, level by level: the best keys of planar heads and their ties.

For B = T/2, T/4, ... the right half of every block of 2B positions asks its left half, and all of
its B queries see all of those B keys. Sort these keys by (x, y) and the queries by slope: then the
best key of a query moves only to the right (the gap between two keys is linear in the slope), and a
monotone argmax needs not B^2 scores but 2 B WIDTH log(B) / log(WIDTH):

    round 1: one query in B / WIDTH looks at every key;
    round r: between two queries that know their best keys lie WIDTH others, which look at the keys
             between these two.

A round is a list of pairs (WIDTH queries, WIDTH keys) in the order of both, of which there are
never more than chunks of keys plus groups of queries, so its shape is fixed; one program runs all
rounds of all levels. Lower half planes ride along: each block's keys are followed by the same keys
turned around, and queries with y < 0 come last. Sorted orders of smaller blocks come from those of
greater ones by stable partition.

Ties are exact where scores are, and where slopes of queries that differ, differ in float32. (Those
of (3683, 3259) and (3240, 2867) do not, so either may be sorted before the other; and of slopes
that underflow all are 0.) The best key L of a query is the last of its equals in the sorted order.
Keys tied with it are its duplicates, which lie beside it; keys on the edge of the hull that ends in
L, which the first query whose best is L finds (its slope is the smallest, so if any query is tied
with that edge, it is); and the edge's other end, which is the best key of the query before.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention import loops, masks, plane
from attention.masks import Mask
from attention.running import running
from attention.types import Array

WIDTH = 16
"""Queries, and keys, in a pair of the monotone argmax."""


class Problem(NamedTuple):
  """One head's queries and keys, padded to a power of two."""

  q: tuple[Array, Array]
  """Turned into the upper half plane."""
  k: tuple[Array, Array]
  size: int
  """How many keys are real. The others repeat key 0 and count as none."""
  towards: plane.Direction
  query_order: Array
  """Queries by half plane and slope."""
  key_order: Array
  """Keys by (x, y)."""


class Level(NamedTuple):
  """The squares of one level: flat arrays of T/2 queries and of T keys (B of them, and the same B
  turned around), in their sorted orders.
  """

  bits: Array  # 2^bits queries ask 2^bits keys in each square
  queries: Array  # positions of the queries, T/2
  keys: Array  # positions of the keys, T
  q: tuple[Array, Array]
  k: tuple[Array, Array]
  lower: Array  # T/2, bool
  best: Array  # T/2: where among `keys` the best one is


def unsupported(q: Array, k: Array, mask: Mask) -> str | None:
  """Why queries `B T N H` of keys `B S K H` cannot be cut into squares of planar keys, or None."""
  (T, H), S = (q.shape[i] for i in (1, 3)), k.shape[1]
  if H != 2:
    return f"its keys lie in a plane, and the head width is {H}, not 2"
  if min(T, S) == 0:
    return f"there is nothing to sort: T={T}, S={S}"
  if mask == masks.everything() or (mask == masks.causal() and T == S):
    return None
  return f"it runs causal() with T = S, or no mask, not {type(mask).__name__}, T={T}, S={S}"


def make_problem(q: Array, k: Array, T: int) -> Problem:
  """Of queries and keys `T 2` and `S 2`, padded to T, a power of two."""
  size = k.shape[0]
  q = jnp.pad(q, ((0, T - q.shape[0]), (0, 0)), constant_values=1)
  k = jnp.concatenate([k, jnp.broadcast_to(k[:1], (T - size, 2))])
  steps = jnp.arange(T, dtype=jnp.int32)
  towards = plane.direction(q[:, 0], q[:, 1])
  by_slope = lax.sort((plane.ordered_bits(towards.slope), steps), num_keys=1)[1]
  x, y = (plane.ordered_bits(jnp.where(c == 0, 0, c)) for c in k.T)  # -0 is 0
  key_order = lax.sort((x, y, steps), num_keys=2)[2]
  query_order = _partition(by_slope, towards.lower[by_slope], jnp.int32(T.bit_length() - 1))
  return Problem((towards.x, towards.y), (k[:, 0], k[:, 1]), size, towards, query_order, key_order)


def _partition(order: Array, bit: Array, bits: Array) -> Array:
  """In every block of 2^bits those whose bit is clear, then those whose bit is set, in order."""
  steps = jnp.arange(order.shape[0], dtype=jnp.int32)
  base = (steps >> bits) << bits
  clear = 1 - bit.astype(jnp.int32)
  total = sums_before(clear)
  before = total[:-1] - total[base]
  inside = total[base + (1 << bits)] - total[base]
  place = base + jnp.where(bit, inside + steps - base - before, before)
  return jnp.zeros_like(order).at[place].set(order, unique_indices=True)


def sums_before(count: Array) -> Array:
  """The sum of what is before each place, and of everything at the end."""
  return jnp.concatenate([jnp.zeros(1, count.dtype), running(jnp.add, count)])


def _rounds(T: int) -> tuple[int, ...]:
  """The strides between queries at the ends of rounds, the longest first."""
  return tuple(WIDTH**i for i in reversed(range(T.bit_length())) if WIDTH**i < max(T, 2))


def off_axis(q: Array) -> Array:
  """Queries `T 2`; those with y = 0, which need no hull, find their way through one: turned by
  1e-30, so that what they find has the best x, but for 1e-30 of how far apart the keys' y are; and
  0, of which all keys are the best, along y.
  """
  x, y = q[:, 0], q[:, 1]
  y = jnp.where(y == 0, jnp.where(x == 0, 1.0, 1e-30).astype(q.dtype), y)
  return jnp.stack([jnp.where(q[:, 1] == 0, jnp.sign(x), x), y], -1)


def search(level: Level, left: Array | None = None) -> Array:
  """Where among `level.keys` each query's best key is: the last one in their order.

  `left`, `T` bool, are the keys to look among. A query who has none gets the last one on its side.
  """
  T = level.keys.shape[0]
  n, chunks = T // 2, T // WIDTH
  groups = n // WIDTH
  pairs = 2 * chunks  # chunks + groups would do; a power of two
  strides = jnp.asarray(_rounds(T), jnp.int32)
  B = jnp.int32(1) << level.bits
  first_round = (strides >= B).sum()
  kx, ky = (x.reshape(chunks, WIDTH) for x in level.k)
  lanes = jnp.arange(WIDTH, dtype=jnp.int32)[None]

  def ends(best, stride):
    """Of groups of `stride` queries, in which the first ones know their keys: first query, first
    and last key.
    """
    first = jnp.arange(groups, dtype=jnp.int32) * stride
    query = jnp.minimum(first, n - 1)
    base = (query >> level.bits) << (level.bits + 1)
    low = jnp.where(query & (B - 1) == 0, base, best[query])
    after = jnp.minimum(query + stride, n - 1)
    ended = (after >> level.bits != query >> level.bits) | (query + stride >= n)
    return first, low, jnp.where(ended, base + 2 * B - 1, best[after])

  def one_round(r, best):
    stride = jnp.where(r == first_round, B, strides[jnp.maximum(r - 1, 0)])
    first, low, high = ends(best, stride)
    steps = jnp.arange(groups, dtype=jnp.int32)
    start = jnp.where(first < n, low // WIDTH + steps, pairs)  # of each group in the list of pairs
    group = running(jnp.add, jnp.zeros(pairs, jnp.int32).at[start].add(1, mode="drop")) - 1
    chunk = jnp.minimum(jnp.arange(pairs, dtype=jnp.int32) - group, chunks - 1)
    query = first[group][:, None] + lanes * strides[r]
    query = jnp.minimum(query, n - 1)
    position = chunk[:, None] * WIDTH + lanes
    inside = (position >= low[group][:, None]) & (position <= high[group][:, None])
    half = jnp.where(inside, (position >> level.bits) & 1, 2)
    allowed = half[:, None, :] == level.lower[query].astype(jnp.int32)[:, :, None]
    queries = tuple(x[query][:, :, None] for x in level.q)
    s = plane.score(queries, (kx[chunk][:, None], ky[chunk][:, None]))
    there = allowed if left is None else allowed & left.reshape(chunks, WIDTH)[chunk][:, None]
    s = jnp.where(there, s, -jnp.inf)
    most = s.max(-1)
    last = jnp.where((s == most[..., None]) & allowed, position[:, None, :], -1).max(-1)
    best_score = jax.ops.segment_max(most, group, groups, indices_are_sorted=True)
    last = jnp.where(most == best_score[group], last, -1)
    last = jax.ops.segment_max(last, group, groups, indices_are_sorted=True)
    target = first[:, None] + lanes * strides[r]
    real = (first < n)[:, None] & (lanes * strides[r] < stride)
    target = jnp.where(real, target, n)
    return best.at[target].set(jnp.maximum(last, 0), mode="drop")

  start = jnp.zeros(n, jnp.int32) + loops.zero((level.q, level.k), jnp.int32)
  best = lax.fori_loop(first_round, len(_rounds(T)), one_round, start)
  return running(jnp.maximum, best)  # sorted already, but for rounding


def fold(problem: Problem, visit: Callable[[Any, Level], Any], carry: Any, lowest: int) -> Any:
  """Folds `visit` over the levels, the largest squares first, down to sides of 2^lowest, which
  must be WIDTH at least.
  """
  T = problem.query_order.shape[0]
  n, top = T // 2, T.bit_length() - 2
  steps = jnp.arange(n, dtype=jnp.int32)
  slots = jnp.arange(T, dtype=jnp.int32)

  def one_level(i, carry):
    query_order, key_order, carry = carry
    bits = jnp.int32(top) - i
    B = jnp.int32(1) << bits
    query_order, key_order = (
      _partition(order, (order >> bits) & 1 == 1, bits + 1) for order in (query_order, key_order)
    )
    queries = query_order[((steps >> bits) << (bits + 1)) + (steps & (B - 1)) + B]
    base, inside = (slots >> (bits + 1)) << (bits + 1), slots & (2 * B - 1)
    turned = inside >= B
    keys = key_order[base + jnp.where(turned, 2 * B - 1 - inside, inside)]
    q, k = jax.tree.map(lambda x: x[queries], problem.q), jax.tree.map(lambda x: x[keys], problem.k)
    k = jax.tree.map(lambda x: jnp.where(turned, -x, x), k)
    lower = problem.towards.lower[queries]
    level = Level(bits, queries, keys, q, k, lower, steps)
    level = level._replace(best=search(level))
    return query_order, key_order, visit(carry, level)

  start = loops.together((problem.query_order, problem.key_order, carry))
  return lax.fori_loop(0, top - lowest + 1, one_level, start)[2]


class Ties(NamedTuple):
  """Which keys of a level are tied for each query: up to three runs of keys.

  Duplicates of the best key; keys on an edge that ends there, found by `asker`; duplicates of the
  edge's other end. Everything of a key is `T`, of a query `T/2`.
  """

  first: Array  # of a key: the first of its duplicates
  asker: Array  # of a key: the first query whose best key is not before it
  on_edge: Array  # of a key: whether it is tied with `asker`'s best key, and no duplicate of it
  leader: Array  # of a query: the first one that has the same best key
  edge: Array  # of a query: whether the keys on `leader`'s edge are tied for it
  other: Array  # of a query: the edge's other end, a key; -1 where it is not tied


def ties_of(level: Level) -> Ties:
  """Found without scoring more than a few keys for each query."""
  n, T = level.queries.shape[0], level.keys.shape[0]
  slots, steps = jnp.arange(T, dtype=jnp.int32), jnp.arange(n, dtype=jnp.int32)
  side = slots >> level.bits  # a block, and which way its keys are turned
  maximum, minimum = (functools.partial(running, f) for f in (jnp.maximum, jnp.minimum))

  changes = functools.reduce(jnp.logical_or, (x != jnp.roll(x, 1) for x in (side, *level.k)))
  first = maximum(jnp.where(changes, slots, 0))
  best = level.best
  starts = (best != jnp.roll(best, 1)) | (steps == 0)
  leader = maximum(jnp.where(starts, steps, 0))
  previous = jnp.where(leader > 0, best[leader - 1], -1)
  previous = jnp.where(side[previous] == side[best], previous, -1)

  asked = jnp.full(T, n, jnp.int32).at[jnp.where(starts, best, T)].set(steps, mode="drop")
  asker = minimum(asked, reverse=True)
  who = jnp.minimum(asker, n - 1)
  theirs = best[who]
  tied = _same_score(level, who, slots, theirs)
  on_edge = tied & (asker < n) & (side == side[theirs]) & (slots < first[theirs])

  following = minimum(jnp.where(on_edge, slots, T), reverse=True)
  begin = jnp.where(previous >= 0, previous + 1, side[best] << level.bits)
  example = following[begin]
  edge = (example < first[best]) & _same_score(level, steps, jnp.minimum(example, T - 1), best)
  other = (previous >= 0) & _same_score(level, steps, jnp.maximum(previous, 0), best)
  return Ties(first, who, on_edge, leader, edge, jnp.where(other, previous, -1))


def _same_score(level: Level, query: Array, one: Array, another: Array) -> Array:
  q = tuple(x[query] for x in level.q)
  one, another = (plane.score(q, tuple(x[i] for x in level.k)) for i in (one, another))
  return one == another


def compare(problem: Problem, queries: Array, old: Array, new: Array) -> tuple[Array, Array]:
  """Whether key `new` is better than key `old`, and whether it is as good, for each query. -1 is no
  key.
  """
  q = tuple(x[queries] for x in problem.q)
  sign = jnp.where(problem.towards.lower[queries], -1, 1).astype(q[0].dtype)
  old_score, new_score = (
    plane.score(q, tuple(sign * x[jnp.maximum(i, 0)] for x in problem.k)) for i in (old, new)
  )
  better = (new >= 0) & ((old < 0) | (new_score > old_score))
  return better, (new >= 0) & (old >= 0) & (new_score == old_score)
