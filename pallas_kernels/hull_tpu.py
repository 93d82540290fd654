"""Walks down the trees of hard-max decoding on TPUs: one token, all trees a level at a time.

A node lies in a row of 128 numbers of HBM, which is what can be copied: per level the row of every
walk comes to scalar memory, all at once, about a microsecond; then the scalar core meets or asks
one after the other, and rows that keys have changed go back. By calculation some 50 cycles for each
walk, 13 us a level for 126 heads with a query each. Only as many levels are walked as the longest
walk has. No chip has run it yet.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hull import Asking, Inputs, Rules, Tree, Walked

Array = jax.Array
LANES = 128
"""Numbers of a row; nodes do not lie across two, and no row holds nodes of two trees."""
_ROOM = 2**19
"""Bytes of scalar memory for the rows of all walks, half of what there is."""


def unsupported(trees: int, asks: int) -> str | None:
  """Why so many walks are refused, or None."""
  most = _ROOM // (4 * LANES)
  if trees + asks > most:
    return f"{trees} trees and {asks} queries are more walks than {most}, which scalar memory holds"
  return None


class _Saved:
  """States of walks in scalar memory: a row of numbers for each field."""

  def __init__(self, ref: Any, like: Any) -> None:
    self.ref = ref
    self.leaves, self.tree = jax.tree.flatten(like)

  def __getitem__(self, walk: Array) -> Any:
    numbers = (self.ref[i, walk] for i in range(len(self.leaves)))
    back = map(lax.bitcast_convert_type, numbers, (like.dtype for like in self.leaves))
    return jax.tree.unflatten(self.tree, back)

  def __setitem__(self, walk: Array, c: Any) -> None:
    for i, x in enumerate(jax.tree.leaves(c)):
      self.ref[i, walk] = lax.bitcast_convert_type(x, jnp.int32)


def _states(rules: Rules) -> tuple[Any, Any]:
  """The fields of a key's state and of a query's."""
  real, whole = (jax.ShapeDtypeStruct((), kind) for kind in (jnp.float32, jnp.int32))
  key = jax.eval_shape(rules.insert, real, real, whole, whole, whole)
  asked = lambda x, y, token: rules.ask((x, y), (x, y), token != 0, token).start(token)
  ask = jax.eval_shape(asked, real, real, whole)
  return key, ask


def _each(count: int, body: Callable[[Array], None]) -> None:
  """Runs the body for every walk."""

  def one(walk, none):
    body(walk)
    return none

  lax.fori_loop(0, count, one, 0)


class _Scratch(NamedTuple):
  """Scalar memory, of 2X keys and G*X queries."""

  key_rows: Any
  """int32 `2X 1 128`: the row of the node that a key is at."""
  ask_rows: Any
  key_states: Any
  """int32 `fields 2X`."""
  ask_states: Any
  rows: Any
  """int32 `2X`: the row of the node that a key has changed on this level, -1 if none."""
  trees: Any
  """int32 `G*X`: which one a query asks."""
  reads: Any
  writes: Any


class _Level:
  """All walks, and what a level does with them."""

  def __init__(self, inputs: Inputs, out: Walked, scratch: _Scratch, tree: Tree, rules: Rules):
    self.inputs, self.out, self.scratch, self.tree, self.rules = inputs, out, scratch, tree, rules
    self.trees, self.asks = inputs.used.shape[0], inputs.queries.shape[0] // 2
    key, ask = _states(rules)
    self.keys, self.queries = _Saved(scratch.key_states, key), _Saved(scratch.ask_states, ask)

  def begin(self) -> None:
    """Every walk at its root."""
    given = self.inputs

    @functools.partial(_each, self.trees)
    def _(t):
      head, second = lax.div(t, jnp.int32(2)), lax.rem(t, jnp.int32(2))
      x, y = (given.keys[2 * head + i] for i in (0, 1))
      x, y = (jnp.where(second == 1, -z, z) for z in (x, y))
      self.keys[t] = self.rules.insert(x, y, given.token[0], given.used[t], given.keep[head])

    @functools.partial(_each, self.asks)
    def _(a):
      asking = self.ask(a)
      tree = 2 * self.head(a) + asking.second
      self.scratch.trees[a] = tree
      self.queries[a] = asking.start(given.used[tree])

  def head(self, a: Array) -> Array:
    return lax.div(a, jnp.int32(2 * self.asks // self.trees))

  def ask(self, a: Array) -> Asking:
    given, head = self.inputs, self.head(a)
    vector = lambda x, i: (x[2 * i], x[2 * i + 1])
    query, key = vector(given.queries, a), vector(given.keys, head)
    return self.rules.ask(query, key, given.keep[head] != 0, given.token[0])

  def place(self, t: Array, c: Any) -> tuple[Array, Array]:
    """The row of a walk's next node, and where it begins there."""
    at, lanes = self.tree.at(t, c.node), jnp.int32(LANES)
    return lax.div(at, lanes), lax.rem(at, lanes)

  def node(self, rows: Any, walk: Array, at: Array) -> tuple[Array, ...]:
    return tuple(rows[walk, 0, at + i] for i in range(self.tree.width))

  def read(self, act: Callable[[Any], None]) -> None:
    """Starts, or waits for, the copies of every node that walks come to."""
    walks = (
      (self.trees, self.keys, self.scratch.key_rows, lambda t: t),
      (self.asks, self.queries, self.scratch.ask_rows, lambda a: self.scratch.trees[a]),
    )
    for which, (count, saved, rows, of) in enumerate(walks):

      def one(walk, which=which, saved=saved, rows=rows, of=of):
        c = saved[walk]

        @pl.when(c.going != 0)
        def _():
          row = self.inputs.nodes.at[self.place(of(walk), c)[0]]
          act(pltpu.make_async_copy(row, rows.at[walk], self.scratch.reads.at[which]))

      _each(count, one)

  def written(self, t: Array) -> Any:
    """The copy of a key's row to where it was."""
    row = self.inputs.nodes.at[self.scratch.rows[t]]
    return pltpu.make_async_copy(self.scratch.key_rows.at[t], row, self.scratch.writes.at[0])

  def meet(self, t: Array) -> None:
    """One key meets a node."""
    c, rows = self.keys[t], self.scratch.key_rows
    row, lane = self.place(t, c)
    self.scratch.rows[t] = jnp.where(c.going != 0, row, -1)

    @pl.when(c.going != 0)
    def _():
      node, then = self.rules.meet(self.node(rows, t, lane), c)
      for i, number in enumerate(node):
        rows[t, 0, lane + i] = number
      self.written(t).start()
      self.keys[t] = then

  def seek(self, a: Array) -> None:
    """One query meets a node."""
    c = self.queries[a]

    @pl.when(c.going != 0)
    def _():
      lane = self.place(self.scratch.trees[a], c)[1]
      then, slot, entry = self.ask(a).seek(self.node(self.scratch.ask_rows, a, lane), c)
      self.out.found[a * self.tree.depth + slot] = entry
      self.queries[a] = then

  def settle(self, t: Array) -> None:
    """Waits for a key's write: the next level may read that row."""

    @pl.when(self.scratch.rows[t] >= 0)
    def _():
      self.written(t).wait()

  def walk(self) -> Array:
    """One level of every walk: how many go on."""
    self.read(lambda copy: copy.start())
    self.read(lambda copy: copy.wait())
    _each(self.trees, self.meet)
    _each(self.asks, self.seek)
    _each(self.trees, self.settle)
    going = lambda saved: lambda walk, n: n + saved[walk].going
    some = lax.fori_loop(0, self.trees, going(self.keys), jnp.int32(0))
    return lax.fori_loop(0, self.asks, going(self.queries), some)

  def end(self) -> None:
    """What was found."""

    @functools.partial(_each, self.trees)
    def _(t):
      self.out.used[t], self.out.merged[t] = self.keys[t].used, self.keys[t].merged

    @functools.partial(_each, self.asks)
    def _(a):
      c, merged = self.queries[a], self.keys[self.scratch.trees[a]].merged
      own, count = self.rules.with_own(
        c.count, self.ask(a).own_is_best(c), self.inputs.token[0], merged
      )
      self.out.found[a * self.tree.depth + c.count], self.out.count[a] = own, count


def _kernel(used, keys, keep, token, queries, _, nodes, *rest, tree: Tree, rules: Rules):
  inputs, out = Inputs(nodes, used, keys, keep, token, queries), Walked(*rest[:4])
  level = _Level(inputs, out, _Scratch(*rest[4:]), tree, rules)
  level.begin()
  lax.while_loop(lambda going: going != 0, lambda _: level.walk(), jnp.int32(1))
  level.end()


def step(inputs: Inputs, tree: Tree, rules: Rules) -> tuple[Array, Walked]:
  """All keys, each into the trees of its head, and all queries: the nodes, and what was found."""
  trees, asks = inputs.used.shape[0], inputs.queries.shape[0]
  # One axis each, for of two the last would take 128 numbers of scalar memory.
  shapes = (trees,), (trees,), (asks * tree.depth,), (asks,)
  whole = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
  rows = inputs.nodes.reshape(-1, 1, LANES)
  keys, queries = inputs.keys.reshape(-1), inputs.queries.reshape(-1)
  fields = [len(jax.tree.leaves(like)) for like in _states(rules)]
  nodes, *walked = pl.pallas_call(
    functools.partial(_kernel, tree=tree, rules=rules),
    in_specs=[smem] * 5 + [hbm],
    out_specs=[hbm, *[smem] * 4],
    out_shape=[whole(rows.shape), *(whole(shape) for shape in shapes)],
    scratch_shapes=_Scratch(
      key_rows=pltpu.SMEM((trees, 1, LANES), jnp.int32),
      ask_rows=pltpu.SMEM((asks, 1, LANES), jnp.int32),
      key_states=pltpu.SMEM((fields[0], trees), jnp.int32),
      ask_states=pltpu.SMEM((fields[1], asks), jnp.int32),
      rows=pltpu.SMEM((trees,), jnp.int32),
      trees=pltpu.SMEM((asks,), jnp.int32),
      reads=pltpu.SemaphoreType.DMA((2,)),
      writes=pltpu.SemaphoreType.DMA((1,)),
    ),
    input_output_aliases={5: 0},
    name="hull_step",
  )(inputs.used, keys, inputs.keep, inputs.token, queries, rows)
  walked = Walked(*walked)
  return nodes.reshape(-1), walked._replace(found=walked.found.reshape(asks, tree.depth))
