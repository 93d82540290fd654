"""Hard-max attention of planar keys, all queries at once: O(T log^2 T) time, O(T) memory, no hull.

Causal attention is cut into squares: inside a block of `DIAGONAL` positions every score is
computed, and above that the right half of every block asks its left half (`hardmax_levels`). Each
query keeps the best of what it meets. Queries with y = 0 need a running maximum and no hull.

The mean over ties adds values up only where some query has a tie: it walks the levels again, key by
key, and takes no differences of running sums, so a great value spoils no mean that it is not in.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention import hardmax_levels, loops, parts, plane
from attention.hardmax_levels import Level, Problem, Ties
from attention.running import running
from attention.types import Array

DIAGONAL = 512
"""Positions in a block whose scores are all computed."""


class Winners(NamedTuple):
  """For each query, which keys are best. Integers; -1 and 0 where there is no key."""

  best: Array
  """One of them."""
  count: Array
  """How many there are."""
  last: Array
  """The last of them."""


def _level_winners(problem: Problem, level: Level, ties: Ties) -> Winners:
  """Of a level's queries, in their order: positions, counts."""
  real = (level.keys < problem.size).astype(jnp.int32)
  n = level.queries.shape[0]
  whole = hardmax_levels.sums_before(real)
  on_edge = (real == 1) & ties.on_edge
  edge_count = jax.ops.segment_sum(on_edge.astype(jnp.int32), ties.asker, n)
  edge_last = jax.ops.segment_max(jnp.where(on_edge, level.keys, -1), ties.asker, n)

  def duplicates(key):
    """How many real keys equal this one, the last of its equals in order, and the last in time."""
    begin = ties.first[key]
    count = whole[key + 1] - whole[begin]
    latest = jnp.where(level.lower, begin + (key + 1 - begin - count), begin + count - 1)
    return count, level.keys[jnp.maximum(latest, 0)]

  count, best = duplicates(level.best)
  other_count, other_last = duplicates(jnp.maximum(ties.other, 0))
  edge, other = ties.edge, ties.other >= 0
  last = jnp.maximum(best, jnp.where(edge, edge_last[ties.leader], -1))
  last = jnp.maximum(last, jnp.where(other, other_last, -1))
  count = count + jnp.where(edge, edge_count[ties.leader], 0) + jnp.where(other, other_count, 0)
  return Winners(best, count, last)


def _merge(problem: Problem, queries: Array, old: Winners, new: Winners) -> Winners:
  better, same = hardmax_levels.compare(problem, queries, old.best, new.best)
  best = jnp.where(better, new.best, old.best)
  count = jnp.where(better, new.count, old.count + jnp.where(same, new.count, 0))
  last = jnp.where(better, new.last, jnp.where(same, jnp.maximum(old.last, new.last), old.last))
  return Winners(best, count, last)


def _fold(
  problem: Problem, visit: Callable[[Any, Level], Any], carry: Any, causal: bool, size: int
):
  """Over every level above the diagonal's blocks; without causality over the greatest alone."""
  T = problem.query_order.shape[0]
  return hardmax_levels.fold(problem, visit, carry, (size if causal else T // 2).bit_length() - 1)


def _blocks(problem: Problem, size: int):
  """Queries and keys of blocks of `size`, and the function of one block that scores it."""
  T = problem.query_order.shape[0]
  q, k = (tuple(x.reshape(T // size, size) for x in xs) for xs in (problem.q, problem.k))
  lower = problem.towards.lower.reshape(T // size, size)
  seen = jnp.tri(size, dtype=bool)

  def tied(q, k, lower):
    sign = jnp.where(lower, -1, 1).astype(q[0].dtype)[:, None]
    s = plane.score(tuple(x[:, None] for x in q), tuple(sign * x[None] for x in k))
    s = jnp.where(seen, s, -jnp.inf)
    return (s == s.max(-1, keepdims=True)) & seen

  return (q, k, lower), tied


def _diagonal(problem: Problem, size: int) -> Winners:
  """The winners among each query's own block, the query itself included."""
  inputs, tied = _blocks(problem, size)
  T = problem.query_order.shape[0]
  steps = jnp.arange(size, dtype=jnp.int32)

  def one(block):
    ties = tied(*block)
    return jnp.where(ties, steps, -1).max(-1), ties.sum(-1, dtype=jnp.int32)

  last, count = (x.reshape(T) for x in lax.map(one, inputs))
  start = jnp.arange(T, dtype=jnp.int32) // size * size
  last = jnp.where(count > 0, start + last, -1)
  return Winners(last, count, last)


def _winners(problem: Problem, causal: bool, diagonal: int) -> Winners:
  """Of queries whose y is not 0, in the order of time."""
  T = problem.query_order.shape[0]
  nobody = jnp.full(T, -1, jnp.int32)
  size = min(diagonal, T)
  start = _diagonal(problem, size) if causal else Winners(nobody, jnp.zeros_like(nobody), nobody)

  def visit(winners, level):
    new = _level_winners(problem, level, hardmax_levels.ties_of(level))
    old = jax.tree.map(lambda x: x[level.queries], winners)
    merged = _merge(problem, level.queries, old, new)
    return jax.tree.map(
      lambda x, y: x.at[level.queries].set(y, unique_indices=True), winners, merged
    )

  return _fold(problem, visit, start, causal, size)


def _tied_sums(problem: Problem, winners: Winners, v: Array, causal: bool, diagonal: int) -> Array:
  """For each query whose y is not 0 the sum of the values of its winners: linear in v, `T h`."""
  T = problem.query_order.shape[0]
  size = min(diagonal, T)
  start = jnp.zeros_like(v)
  if causal:
    inputs, tied = _blocks(problem, size)
    counted = _counted(problem, winners, _diagonal(problem, size).best).reshape(-1, size, 1)
    sums = lax.map(
      lambda x: jnp.matmul(tied(*x[0]).astype(v.dtype), x[1], precision="highest"),
      (inputs, v.reshape(T // size, size, -1)),
    )
    start = jnp.where(counted, sums, 0).reshape(v.shape)

  def visit(total, level):
    ties, counted, values = _part(problem, winners, level, v)
    same = jax.ops.segment_sum(values, ties.first, T, indices_are_sorted=True)
    on_edge = jnp.where(ties.on_edge[:, None], values, 0)
    edge = jax.ops.segment_sum(on_edge, ties.asker, level.queries.shape[0])
    out = same[ties.first[level.best]]
    out = out + jnp.where(ties.edge[:, None], edge[ties.leader], 0)
    other = same[ties.first[jnp.maximum(ties.other, 0)]]
    out = out + jnp.where(ties.other[:, None] >= 0, other, 0)
    return total.at[level.queries].add(jnp.where(counted, out, 0), unique_indices=True)

  return _fold(problem, visit, start, causal, size)


def _tied_sums_transposed(
  problem: Problem, winners: Winners, g: Array, causal: bool, diagonal: int
) -> Array:
  """What `_tied_sums` sends back to the values: for each key the sum of its winners' g."""
  T = problem.query_order.shape[0]
  size = min(diagonal, T)
  start = jnp.zeros_like(g)
  if causal:
    inputs, tied = _blocks(problem, size)
    counted = _counted(problem, winners, _diagonal(problem, size).best).reshape(-1, size, 1)
    sums = lax.map(
      lambda x: jnp.matmul(tied(*x[0]).astype(g.dtype).T, x[1], precision="highest"),
      (inputs, jnp.where(counted, g.reshape(T // size, size, -1), 0)),
    )
    start = sums.reshape(g.shape)

  def visit(total, level):
    ties, counted, _ = _part(problem, winners, level, g)
    sent = jnp.where(counted, g[level.queries], 0)
    n = level.queries.shape[0]
    to_other = jnp.where(ties.other >= 0, ties.first[jnp.maximum(ties.other, 0)], T)
    same = jax.ops.segment_sum(sent, ties.first[level.best], T)
    same = same + jax.ops.segment_sum(sent, to_other, T)
    edge = jax.ops.segment_sum(jnp.where(ties.edge[:, None], sent, 0), ties.leader, n)
    values = same[ties.first] + jnp.where(ties.on_edge[:, None], edge[ties.asker], 0)
    values = jnp.where((level.keys < problem.size)[:, None], values, 0)
    return total.at[level.keys].add(values)

  return _fold(problem, visit, start, causal, size)


def _counted(problem: Problem, winners: Winners, best: Array) -> Array:
  """Whether each query's best key here is as good as its best one anywhere, T bool."""
  return hardmax_levels.compare(problem, jnp.arange(best.shape[0]), winners.best, best)[1]


def _part(problem, winners, level, v):
  """What of a level counts: its ties, which queries have their winners here, its keys' values."""
  best = level.keys[level.best]
  _, counted = hardmax_levels.compare(problem, level.queries, winners.best[level.queries], best)
  real = (level.keys < problem.size)[:, None]
  return hardmax_levels.ties_of(level), counted[:, None], jnp.where(real, v[level.keys], 0)


# Queries with y = 0: the greatest kx so far, the least, or, where x is 0 too, every key.


def _axis_kind(q: Array) -> Array:
  return jnp.where(q[:, 0] > 0, 0, jnp.where(q[:, 0] < 0, 1, 2))


def _by_axis(k: Array, parts: Any, add: Callable[[Any, Any], Any], causal: bool, T: int) -> Any:
  """`parts` of the best keys so far, added up, for every kind of axis, `3 T ...`."""

  def combine(old, new):
    (old_m, old), (new_m, new) = old, new

    def both(a, b):
      shape = old_m.shape + (1,) * (a.ndim - old_m.ndim)
      left, right = (old_m >= new_m).reshape(shape), (new_m >= old_m).reshape(shape)
      return jnp.where(left & right, add(a, b), jnp.where(left, a, b))

    return jnp.maximum(old_m, new_m), jax.tree.map(both, old, new)

  def one(m):
    size = 1 << max(m.shape[0] - 1, 1).bit_length()  # what is added at the end is seen by none
    whole = jax.tree.map(
      lambda x: jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)), (m, parts)
    )
    whole = loops.together(whole)
    total = jax.tree.map(lambda x: x[: m.shape[0]], running(combine, whole)[1])
    return (
      total
      if causal
      else jax.tree.map(lambda x: jnp.broadcast_to(x[-1:], (T, *x.shape[1:])), total)
    )

  return lax.map(one, jnp.stack([k[:, 0], -k[:, 0], jnp.zeros_like(k[:, 0])]))


def _axis_winners(q: Array, k: Array, causal: bool) -> Winners:
  steps, (T, S) = jnp.arange(q.shape[0]), (q.shape[0], k.shape[0])
  kind = _axis_kind(q)
  last = _by_axis(k, jnp.arange(S, dtype=jnp.int32), jnp.maximum, causal, T)[kind, steps]
  count = _by_axis(k, jnp.ones(S, jnp.int32), jnp.add, causal, T)[kind, steps]
  return Winners(last, count, last)


def _axis_sums(q: Array, k: Array, v: Array, causal: bool) -> Array:
  return _by_axis(k, v, jnp.add, causal, q.shape[0])[_axis_kind(q), jnp.arange(q.shape[0])]


class _Head(NamedTuple):
  """How one head's arrays lie in a problem whose length is a power of two."""

  problem: Problem
  q: Array
  k: Array
  before: int
  """Where its queries begin."""
  causal: bool
  diagonal: int

  @property
  def axis(self) -> Array:
    return self.q[:, 1] == 0

  def queries(self, x: Array) -> Array:
    """The part of `x`, an array of the problem, that belongs to the queries."""
    return x[self.before : self.before + self.q.shape[0]]

  def padded(self, x: Array, before: int = 0) -> Array:
    """An array of this head as one of the problem."""
    after = self.problem.query_order.shape[0] - before - x.shape[0]
    return jnp.pad(x, [(before, after)] + [(0, 0)] * (x.ndim - 1))


def _head(q: Array, k: Array, causal: bool, diagonal: int) -> _Head:
  (T, S) = q.shape[0], k.shape[0]
  size = 1 << max((max(T, S) - 1).bit_length(), 4)
  before = 0 if causal else size
  size = max(size, 2 * hardmax_levels.WIDTH) if causal else 2 * size
  front = jnp.ones((before, 2), q.dtype)
  return _Head(
    hardmax_levels.make_problem(jnp.concatenate([front, q]), k, size),
    q,
    k,
    before,
    causal,
    diagonal,
  )


def _if_any(condition: Array, true: Callable[[], Any], false: Callable[[], Any]) -> Any:
  """`true()`, right for every head, where a head of the part needs it."""
  return lax.cond(parts.anywhere(condition), lambda _: true(), lambda _: false(), None)


def _all_winners(head: _Head) -> Winners:
  """Of every query."""
  hull = jax.tree.map(head.queries, _winners(head.problem, head.causal, head.diagonal))
  return _if_any(
    head.axis,
    lambda: jax.tree.map(
      lambda x, y: jnp.where(head.axis, x, y), _axis_winners(head.q, head.k, head.causal), hull
    ),
    lambda: hull,
  )


def _inside(head: _Head, winners: Winners) -> Winners:
  """As arrays of the problem."""
  return jax.tree.map(lambda x: head.padded(x, head.before), winners)


def _sums(head: _Head, winners: Winners, v: Array) -> Array:
  whole = _tied_sums(
    head.problem, _inside(head, winners), head.padded(v), head.causal, head.diagonal
  )
  hull = head.queries(whole)
  return _if_any(
    head.axis,
    lambda: jnp.where(head.axis[:, None], _axis_sums(head.q, head.k, v, head.causal), hull),
    lambda: hull,
  )


def _sums_transposed(head: _Head, winners: Winners, g: Array) -> Array:
  S = head.k.shape[0]
  axis = head.axis[:, None]
  inside = head.padded(jnp.where(axis, 0, g), head.before)
  hull = _tied_sums_transposed(
    head.problem, _inside(head, winners), inside, head.causal, head.diagonal
  )[:S]

  def with_axis():
    # It varies as g does, or the devices of `jax.shard_map` would add up what they send.
    nothing = jnp.zeros((S, g.shape[1]), g.dtype) + loops.zero(g, g.dtype)
    _, send = jax.vjp(lambda v: _axis_sums(head.q, head.k, v, head.causal), nothing)
    return hull + send(jnp.where(axis, g, 0))[0]

  return _if_any(head.axis, with_axis, lambda: hull)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(ties, causal, diagonal, q, k, v):
  return _forward(ties, causal, diagonal, q, k, v)[0]


def _forward(ties, causal, diagonal, q, k, v):
  """Of q `B N T 2`, k `B N S 2`, v `B N S h`."""

  def one(q, k, v):
    head = _head(q, k, causal, diagonal)
    winners = _all_winners(head)
    nobody = winners.count == 0
    winners = winners._replace(last=jnp.where(nobody, -1, winners.last))
    read = lambda: jnp.where(nobody[:, None], 0, v[winners.last])
    if ties == "latest":
      return read(), winners
    count = jnp.maximum(winners.count, 1)[:, None].astype(v.dtype)
    return _if_any(winners.count > 1, lambda: _sums(head, winners, v) / count, read), winners

  out, winners = parts.each(one, q, k, v)
  return (out, winners), (q, k, winners)


def _backward(ties, causal, diagonal, saved, cotangents):
  def one(q, k, winners, g):
    to_last = lambda: jax.ops.segment_sum(g, winners.last, k.shape[0])
    if ties == "latest":
      return to_last()
    g = g / jnp.maximum(winners.count, 1)[:, None].astype(g.dtype)
    spread = lambda: _sums_transposed(_head(q, k, causal, diagonal), winners, g)
    return _if_any(winners.count > 1, spread, to_last)

  q, k, winners = saved
  return jnp.zeros_like(q), jnp.zeros_like(k), parts.each(one, q, k, winners, cotangents[0])


_attend.defvjp(_forward, _backward)


def attend(
  q: Array, k: Array, v: Array, *, ties: str, causal: bool, diagonal: int = DIAGONAL
) -> tuple[Array, Winners]:
  """The output `B T N h` and the winners `B T N` of q `B T N 2`, k `B S K 2`, v `B S K h`,
  float32 or float64.
  """
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  rows = loops.together(tuple(x.swapaxes(1, 2) for x in (q, k, v)))
  out, winners = _attend(ties, causal, diagonal, *rows)
  return out.swapaxes(1, 2), jax.tree.map(lambda x: x.swapaxes(1, 2), winners)
