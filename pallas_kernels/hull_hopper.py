"""Walks down the trees of hard-max decoding on Hopper GPUs (sm_90a): one token, all trees at once.

Of every batch row, head and half plane one program walks one tree: it reads a node, lets a pure
function decide what the node becomes and where to go on, and writes it where it was. A walk is up
to 33 reads that wait for each other, some 600 ns each from memory and 200 from the L2 cache, and
trees do not wait for one another: a step costs about two walks, however many heads there are, until
their reads fill the memory's 4.8 TB/s. All threads of a warpgroup do the same; the time is the
reads'. No chip has run it yet.

The walk's rules are the caller's (`attention.hull`), with a state of single numbers:

    meet(row, c) -> (row, c)              a key on its way down meets a node
    seek(row, c) -> (c, slot, entry)      a query does; the entry is one that it may read

`row` is a node, `width` int32, and `c` a tuple with the fields `node`, where to read next, and
`going`, an int32 that is 0 where the walk ends.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hardmax, hopper

Array = jax.Array

_LOWERING = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
"""The other lowering cannot read the bits of a single number as a float's. A slope is a quotient
that must round as everywhere: no approximate math.
"""


class Keys(NamedTuple):
  """What an insertion reads."""

  nodes: Any
  """int32, tree after tree, `size` nodes of `width` numbers; the kernel also writes it."""
  used: Any
  """int32 `trees`."""
  keys: Any
  """float32 `trees 2`."""
  keep: Any
  """int32 `trees`: 0 leaves a tree as it is."""
  token: Any
  """int32 `1`."""


class Queries(NamedTuple):
  """What queries read."""

  nodes: Any
  used: Any
  queries: Any
  """float32 `queries 2`."""


def _insert(
  inputs: Keys, used_gmem, merged_gmem, *, scratch, size: int, width: int, start: Any, meet: Any
):
  del scratch
  tree = lax.axis_index("tree")
  x, y = inputs.keys[tree, 0], inputs.keys[tree, 1]
  c = start(x, y, inputs.token[0], inputs.used[tree], inputs.keep[tree])

  def turn(c):
    at = (tree * size + c.node) * width
    row, c = meet(tuple(inputs.nodes[at + i] for i in range(width)), c)
    for i, x in enumerate(row):
      inputs.nodes[at + i] = x
    return c

  c = lax.while_loop(lambda c: c.going != 0, turn, c)
  used_gmem[tree] = c.used
  merged_gmem[tree] = c.merged


def insert(
  keys: Keys, *, size: int, width: int, start: Callable[..., Any], meet: Callable[..., Any]
) -> tuple[Array, Array, Array]:
  """All keys, each into its tree: (nodes, used, merged). `start(x, y, token, used, keep)` begins a
  walk, whose end has the fields `used` and `merged`.
  """
  trees = keys.used.shape[0]
  shape = jax.ShapeDtypeStruct((trees,), jnp.int32)
  body = functools.partial(_insert, size=size, width=width, start=start, meet=meet)
  kernel = hopper.launch_alone(
    "hull_insert", body, {"tree": trees}, (shape, shape), params=_LOWERING
  )

  def run(refs):
    nodes, used, merged = refs
    used[...], merged[...] = kernel(keys._replace(nodes=nodes))

  zeros = jnp.zeros(shape.shape, shape.dtype)
  return pl.run_state(run)((keys.nodes, zeros, zeros))


def _query(
  inputs: Queries, found_gmem, count_gmem, *, scratch, group: int, size: int, width: int, walk: Any
):
  del scratch
  ask = lax.axis_index("ask")
  lower, start, seek = walk(inputs.queries[ask, 0], inputs.queries[ask, 1])
  tree = 2 * lax.div(ask, group) + lower
  c = start(inputs.used[tree])

  def turn(c):
    at = (tree * size + c.node) * width
    c, slot, entry = seek(tuple(inputs.nodes[at + i] for i in range(width)), c)
    found_gmem[ask, slot] = entry
    return c

  c = lax.while_loop(lambda c: c.going != 0, turn, c)
  count_gmem[ask] = c.count


def query(
  queries: Queries, *, group: int, depth: int, size: int, width: int, walk: Callable[..., Any]
) -> tuple[Array, Array]:
  """The entries that each query found, `queries depth`, and how many of them count.

  `group` queries in a row are one head's; `walk(x, y)` says which of the head's two trees is to be
  asked, what begins with its number of nodes, and what then seeks: its end has the field `count`.
  """
  asks = queries.queries.shape[0]
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  body = functools.partial(_query, group=group, size=size, width=width, walk=walk)
  found = shape((asks, depth)), shape((asks,))
  return hopper.launch_alone("hull_query", body, {"ask": asks}, found, params=_LOWERING)(queries)


def score(query: tuple[Array, Array], key: tuple[Array, Array]) -> Array:
  """`pallas_kernels.hardmax.score`, of two vectors given coordinate by coordinate."""
  return hardmax.score(zip(query, key, strict=True))
