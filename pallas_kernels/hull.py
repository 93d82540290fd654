"""One step of hard-max decoding, as every chip's kernel takes it: a key into both trees of its
head, and each query down one of them, side by side.

    step(Inputs, Tree, Rules) -> (nodes, Walked)

The rules of a walk are the caller's (`attention.hull`), with a state of single numbers. A node is a
`row` of int32, and `c` a tuple with the fields `node`, where to read next, and `going`, an int32
that is 0 where the walk ends. All walks go down one node a turn, and what a turn reads it reads
before it writes: a query sees no node that the key has changed, and reads its own key apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hardmax


class Tree(NamedTuple):
  """The shape of a tree."""

  size: int
  """Nodes that there is room for."""
  width: int
  """Numbers of a node."""
  stride: int
  """From node to node."""
  depth: int
  """Entries that a query finds at most."""

  def at(self, tree: Any, node: Any) -> Any:
    """Where a tree's node begins in `Inputs.nodes`."""
    return (tree * self.size + node) * self.stride


class Asking(NamedTuple):
  """How one query walks."""

  second: Any
  """Which of the head's two trees it asks, 0 or 1."""
  start: Callable[..., Any]
  """start(used) -> c, whose end has the field `count`."""
  seek: Callable[..., Any]
  """seek(row, c) -> (c, slot, entry): an entry that the query may read, and where to put it."""
  own_is_best: Callable[..., Any]
  """own_is_best(c), at the end: 1 if no key is better than the query's own, else 0."""


class Rules(NamedTuple):
  """How keys and queries walk."""

  insert: Callable[..., Any]
  """insert(x, y, token, used, keep) -> c, whose end has the fields `used` and `merged`."""
  meet: Callable[..., Any]
  """meet(row, c) -> (row, c): a key on its way down meets a node."""
  ask: Callable[..., Asking]
  """ask(query, key, keep, token), of vectors (x, y)."""
  with_own: Callable[..., Any]
  """with_own(count, own, token, merged) -> (entry, count): what the own key adds to what was found,
  behind the others, and how many entries count then; `merged` is of the tree that was asked.
  """


class Inputs(NamedTuple):
  """What a step reads, of X heads with G queries each."""

  nodes: Any
  """int32, tree after tree; the kernel also writes it."""
  used: Any
  """int32 `2X`: the nodes of each tree."""
  keys: Any
  """float32 `X 2`, turned around for the second tree of a head."""
  keep: Any
  """int32 `X`: 0 leaves a tree as it is."""
  token: Any
  """int32 `1`."""
  queries: Any
  """float32 `G*X 2`, the queries of a head in a row."""


class Walked(NamedTuple):
  """What a step finds, beside the nodes."""

  used: Any
  merged: Any
  """int32 `2X`, of the keys."""
  found: Any
  """int32 `G*X depth`: entries."""
  count: Any
  """int32 `G*X`: how many of them count."""


def gone_on(c: Any, then: Any) -> Any:
  """The next state of a walk, unless it has ended."""
  return jax.tree.map(lambda old, new: jnp.where(c.going != 0, new, old), c, then)


def score(query: tuple[jax.Array, jax.Array], key: tuple[jax.Array, jax.Array]) -> jax.Array:
  """`pallas_kernels.hardmax.score`, of two vectors given coordinate by coordinate."""
  return hardmax.score(zip(query, key, strict=True))
