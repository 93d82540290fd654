"""How keys and queries walk down a Li Chao tree, a node at a time, in single numbers.

A key (x, y) is a line, x m + y over slopes m. A node answers for an interval of slopes and holds
the line that is highest at its middle; the loser there sinks to the only side where it can still
win (Li 2013; `cp-algorithms.com/geometry/convex_hull_trick.html`). Slopes are float32 read as
ordered integers, so a path has 33 nodes at most. A line that loses at both ends of the interval it
would sink into is dropped.

A query goes down the tree that the tokens before have left, and reads its own token's key apart:
no walk waits for another. Loops (`attention.hull`) and chips' kernels (`pallas_kernels.hull`) take
their turns by these rules; a node is a `row`: x and y (the bits of float32), entry, left child,
right child.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attention import native, plane
from pallas_kernels.hull import Asking

WIDTH = 5
"""Numbers in a node."""
FOUND = 34
"""Entries that a query finds at most: one of each node of its path, and its own."""
_LARGEST = float(jnp.finfo(jnp.float32).max)
_ENDS = [int(x) for x in np.array([-_LARGEST, _LARGEST], np.float32).view(np.uint32)]
_SLOPES = (0xFFFFFFFF ^ _ENDS[0], 0x80000000 | _ENDS[1])
"""The least and the greatest slope, as `plane.ordered_bits` numbers them."""


class _Line(NamedTuple):
  """A key of one tree."""

  x: Array
  y: Array
  entry: Array


class _Place(NamedTuple):
  """The slopes that a node answers for, as ordered integers."""

  low: Array
  high: Array

  @property
  def middle(self) -> Array:
    return self.low + ((self.high - self.low) >> 1)

  def half(self, right: Array) -> "_Place":
    middle = self.middle
    return _Place(jnp.where(right, middle + 1, self.low), jnp.where(right, self.high, middle))


def _root() -> _Place:
  return _Place(*(jnp.uint32(end) for end in _SLOPES))


def _lead(one: _Line, other: _Line, slope: Array) -> Array:
  """How much higher the first line is. Where a product overflows, its sign is what counts."""
  return (one.x - other.x) * slope + (one.y - other.y)


class Sinking(NamedTuple):
  """A line on its way down."""

  node: Array
  """Where it comes to."""
  place: _Place
  """Of the node before."""
  turned: Array
  """What was decided there, packed: whether it went right; whether nothing was, at the root; ..."""
  line: _Line
  used: Array
  merged: Array
  """The entry of a key that is equal, or -1."""
  going: Array
  """0 at the end."""


def start_sinking(x: Array, y: Array, token: Array, used: Array, keep: Array) -> Sinking:
  """A token's key at the root of a tree of `used` nodes; `keep` is 0 if it has no room there."""
  root, turned = jnp.int32(0), native.pack(jnp.array(False), jnp.array(True))
  return Sinking(root, _root(), turned, _Line(x, y, token), used, jnp.int32(-1), keep)


def meet(ties: str, row: Any, c: Sinking) -> tuple[tuple[Array, ...], Sinking]:
  """The line meets a node, whose numbers are `row`: the better one stays, the other goes on."""
  there, line = _Line(native.floats(row[0]), native.floats(row[1]), row[2]), c.line
  right, root = native.unpack(c.turned, 2)
  place = _Place(
    *(jnp.where(root, a, b) for a, b in zip(c.place, c.place.half(right), strict=True))
  )
  empty = c.node == c.used
  lead = _lead(line, there, plane.from_ordered_bits(place.middle))
  same = line.x == there.x
  equal = same & (line.y == there.y) & ~empty
  # Of lines that meet in the middle the flatter one sinks: the left half has the middle.
  wins = jnp.where(same, line.y > there.y, (lead > 0) | ((lead == 0) & (line.x > there.x)))
  wins = empty | wins | (equal if ties == "latest" else False)
  right = ((line.x > there.x) != wins) & ~same
  turned = native.pack(right, jnp.array(False), wins, empty, same, equal, lead != 0)
  right, _, wins, empty, same, equal, apart = native.unpack(turned, 7)
  choose = lambda a, b: _Line(*(jnp.where(wins, x, y) for x, y in zip(a, b, strict=True)))
  upper, lower = choose(line, there), choose(there, line)
  end = plane.from_ordered_bits(jnp.where(right, place.high, place.low))
  hopeless = apart & (_lead(lower, upper, end) < 0)
  stop = empty | same | hopeless | (place.low == place.high)
  child = jnp.where(right, row[4], row[3])
  new = ~stop & (child == 0)
  child = jnp.where(new, c.used, child)
  left, right_child = (jnp.where(empty, 0, x) for x in (row[3], row[4]))
  row = (
    native.bits(upper.x), native.bits(upper.y), upper.entry,
    jnp.where(new & ~right, child, left), jnp.where(new & right, child, right_child),
  )  # fmt: skip
  merged = c.merged if ties == "latest" else jnp.where(equal, there.entry, c.merged)
  used, going = c.used + empty.astype(jnp.int32), (~stop).astype(jnp.int32)
  return row, Sinking(child, place, turned, lower, used, merged, going)


class Seeking(NamedTuple):
  """A query on its way down a tree that does not hold its token's own key yet."""

  node: Array
  """Where it comes to."""
  place: _Place
  """Of that node."""
  best: Array
  """The best score so far; the own key's counts."""
  last: Array
  """The last entry that has it."""
  count: Array
  """How many entries count: of what was found the first ones."""
  going: Array
  """0 at the end."""


def asking(
  ties: str, score: Callable[..., Array], query: tuple[Array, Array], key: tuple[Array, Array],
  keep: Array, token: Array,
) -> Asking:  # fmt: skip
  """How a query walks. Its token's own key, if it is kept, is the best so far: the tree does not
  hold it yet.
  """
  aim = plane.direction(*query)
  upward = aim.x, aim.y
  own = score(upward, tuple(jnp.where(aim.lower, -x, x) for x in key))
  own = jnp.where(keep & (own == own), own, -jnp.inf)

  def start(used):
    along_axis = aim.axis | (aim.x == 0)  # What is read there is known without a walk.
    going = (~along_axis & (used != 0)).astype(jnp.int32)
    last = jnp.where(own > -jnp.inf, token, 0)
    return Seeking(jnp.int32(0), _root(), own, last, jnp.int32(0), going)

  def seek(row, c):
    height = score(upward, (native.floats(row[0]), native.floats(row[1])))
    better, tie = height > c.best, height == c.best
    slot, entry = jnp.where(better, 0, c.count), row[2]
    count = slot + (better | tie).astype(jnp.int32)
    last = jnp.where(better, entry, jnp.where(tie, jnp.maximum(entry, c.last), c.last))
    if ties == "latest":
      slot, entry, count = jnp.int32(0), last, jnp.int32(1)
    slope = plane.ordered_bits(jnp.clip(aim.slope, -_LARGEST, _LARGEST))
    right = slope > c.place.middle
    child = jnp.where(right, row[4], row[3])
    going = ((child != 0) & (c.place.low != c.place.high)).astype(jnp.int32)
    best = jnp.maximum(c.best, height)
    return Seeking(child, c.place.half(right), best, last, count, going), slot, entry

  def own_is_best(c):
    return ((own > -jnp.inf) & (c.best == own)).astype(jnp.int32)

  return Asking(aim.lower.astype(jnp.int32), start, seek, own_is_best)


def with_own(
  ties: str, count: Array, own: Array, token: Array, merged: Array
) -> tuple[Array, Array]:
  """Which entry comes behind the `count` that were found, and how many there are then: one more if
  the token's own key is as good (`own`), unless its values are with those of an equal key,
  `merged`, which was found too where scores are exact.
  """
  more = count == 0
  if ties == "average":
    more |= merged < 0
  return jnp.where(merged < 0, token, merged), count + jnp.where(more, own, 0)
