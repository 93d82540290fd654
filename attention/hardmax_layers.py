"""The k best keys of planar heads, exactly: windows on layers of keys, O(T k^2 log^2 T) time.

In a square of queries and keys that all see each other (`hardmax_levels`) let layer 0 be the keys
that are the best of some query; layer 1 those that are, when layer 0 is taken out; and so on.

    - For each query, a layer holds a key that is no worse than anything below it. So the k best of
      the square lie in layers 0 to k - 1, and of layer j at most k - j are among them.
    - A layer is a chain in convex position, along which a query's score rises to its best key and
      then falls. So these k - j lie within k - 1 - j places of that key.

k^2 candidates in all, of which `lax.top_k` takes k. Convex layers (Chazelle 1985,
https://doi.org/10.1109/TIT.1985.1057060) have the same two properties, but here no hull is built: a
layer is one more monotone search (`hardmax_levels.search`). Nothing was assumed of ties: a
duplicate, or a key on an edge that no query chooses, stays for a later layer, when as many keys as
good as it have been taken out. So where scores are exact, as those of integers, and slopes of
queries that differ, differ in float32, the k scores are those of a scan; along x, but for what
`hardmax_levels.off_axis` says. Elsewhere a key may be missed whose score is above the one taken by
rounding.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention import hardmax_levels, parts, plane
from attention.hardmax_levels import Level, Problem

DIAGONAL = 256
"""Positions in a block whose scores are all computed."""
_CANDIDATES = 2**18
"""Scores of candidates held at once."""


def retrieve(
  q: Float[Array, "B T N 2"],
  k: Float[Array, "B S K 2"],
  *,
  top_k: int,
  causal: bool,
  diagonal: int = DIAGONAL,
) -> Int[Array, "B T N C"]:
  """The best keys of every query, the best first, -1 where there is none. Of equal ones any.

  `top_k` is at most `diagonal`; with `causal` T is S. No gradient.
  """
  q, k = lax.stop_gradient((q, k))
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  q, k = (x.swapaxes(1, 2) for x in (q, k))
  top_k = min(top_k, k.shape[2])
  one = functools.partial(_one_head, top_k=top_k, causal=causal, diagonal=diagonal)
  return parts.each(one, q, k).swapaxes(1, 2)


def _one_head(q: Array, k: Array, *, top_k: int, causal: bool, diagonal: int) -> Int[Array, "T C"]:
  T, S = q.shape[0], k.shape[0]
  size = max(1 << (max(T, S) - 1).bit_length(), hardmax_levels.WIDTH)
  before = 0 if causal else size  # all queries ask the left half of one block, or each its past
  size = max(2 * hardmax_levels.WIDTH, size + before)
  q = jnp.pad(q, ((before, size - before - T), (0, 0)), constant_values=1)
  problem = hardmax_levels.make_problem(hardmax_levels.off_axis(q), k, size)
  k = jnp.pad(k, ((0, size - S), (0, 0)))
  block = min(diagonal, size) if causal else size // 2
  found = _diagonal(q, k, block, top_k) if causal else _nothing(size, top_k, q.dtype)
  visit = functools.partial(_visit, q, k, problem, top_k)
  score, index = hardmax_levels.fold(problem, visit, found, block.bit_length() - 1)
  return jnp.where(score > -jnp.inf, index, -1)[before : before + T]


def _nothing(size: int, top_k: int, dtype) -> tuple[Array, Array]:
  return jnp.full((size, top_k), -jnp.inf, dtype), jnp.full((size, top_k), -1, jnp.int32)


def _diagonal(q: Array, k: Array, block: int, top_k: int) -> tuple[Array, Array]:
  """Scores and positions of the best keys of each query's own block, itself included."""

  def one(x):
    start, q, k = x
    score = jnp.where(jnp.tri(block, dtype=bool), plane.scores(q, k), -jnp.inf)
    score, index = parts.top_k(score, top_k)
    return score, start + index

  blocks = (x.reshape(-1, block, 2) for x in (q, k))
  starts = jnp.arange(0, q.shape[0], block, dtype=jnp.int32)
  found = lax.map(one, (starts, *blocks))
  return jax.tree.map(lambda x: x.reshape(-1, top_k), found)


def _visit(
  q: Array, k: Array, problem: Problem, top_k: int, found: tuple[Array, Array], level: Level
) -> tuple[Array, Array]:
  """Puts the best keys of a level's squares among those found before."""
  lists, places = _layers(problem, level, top_k)
  n = level.queries.shape[0]
  side = (jnp.arange(n, dtype=jnp.int32) >> level.bits) * 2 + level.lower.astype(jnp.int32)
  reach = [jnp.arange(1 + j - top_k, top_k - j, dtype=jnp.int32) for j in range(top_k)]

  def one(x):
    query, side, place, score, index = x
    slots = jnp.concatenate([lists[j][place[j] + reach[j]] for j in range(top_k)])
    inside = (slots >= 0) & (slots >> level.bits == side)
    keys = level.keys[jnp.maximum(slots, 0)]
    new = plane.score(tuple(q[query]), tuple(k[keys].T))
    score = jnp.concatenate([score, jnp.where(inside, new, -jnp.inf)])
    score, chosen = parts.top_k(score, top_k)
    return score, jnp.concatenate([index, keys])[chosen]

  old = tuple(x[level.queries] for x in found)
  asked = (level.queries, side, places.T, *old)
  batch = 1 << (max(1, _CANDIDATES // top_k**2).bit_length() - 1)
  new = lax.map(one, asked, batch_size=min(n, batch))
  return jax.tree.map(lambda x, y: x.at[level.queries].set(y, unique_indices=True), found, new)


def _layers(problem: Problem, level: Level, top_k: int) -> tuple[Array, Array]:
  """The layers' slots among `level.keys` in their order, with `top_k` times -1 before and after;
  and where in each layer every query's best key is.
  """
  T = level.keys.shape[0]
  slots = jnp.arange(T, dtype=jnp.int32)

  def one(left, _):
    best = hardmax_levels.search(level, left)
    layer = left & jnp.zeros(T, bool).at[best].set(True)
    place = hardmax_levels.sums_before(layer.astype(jnp.int32))[:-1] + top_k
    nobody = jnp.full(T + 2 * top_k, -1, jnp.int32)
    chain = nobody.at[jnp.where(layer, place, nobody.shape[0])].set(slots, mode="drop")
    return left & ~layer, (chain, place[best])

  return lax.scan(one, level.keys < problem.size, None, length=top_k)[1]
