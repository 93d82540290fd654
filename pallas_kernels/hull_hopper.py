"""Walks down the trees of hard-max decoding on Hopper GPUs (sm_90a): one token, all trees at once.

Of every batch row, head and half plane one program walks one tree (`pallas_kernels.hull`). A step
is up to 33 reads that wait for each other, some 600 ns each from memory and 200 from the L2 cache,
however many heads there are, until their reads fill the memory's 4.8 TB/s. All threads of a
warpgroup do the same; the time is the reads'. No chip has run it yet.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hull import Inputs, Rules, Tree, Walked, gone_on

Array = jax.Array

_LOWERING = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
"""The other lowering cannot read the bits of a single number as a float's. A slope is a quotient
that must round as everywhere: no approximate math.
"""


def _walk(inputs: Inputs, *outputs: Any, scratch: Any, tree: Tree, rules: Rules):
  del scratch
  out, mine = Walked(*outputs), lax.axis_index("tree")
  head, half = lax.div(mine, jnp.int32(2)), lax.rem(mine, jnp.int32(2))
  keep, used, token = inputs.keep[head], inputs.used[mine], inputs.token[0]
  key = inputs.keys[head, 0], inputs.keys[head, 1]
  group = inputs.queries.shape[0] // inputs.keys.shape[0]
  asks = [head * group + i for i in range(group)]
  asking = [
    rules.ask((inputs.queries[ask, 0], inputs.queries[ask, 1]), key, keep != 0, token)
    for ask in asks
  ]
  seeking = [a.start(jnp.where(a.second == half, used, 0)) for a in asking]

  def read(c):
    at = tree.at(mine, c.node)
    return tuple(inputs.nodes[at + i] for i in range(tree.width))

  def turn(carry):
    sinking, queries = carry
    node, *rows = (read(c) for c in (sinking, *queries))
    node, after = rules.meet(node, sinking)

    @pl.when(sinking.going != 0)
    def _():
      for i, number in enumerate(node):
        inputs.nodes[tree.at(mine, sinking.node) + i] = number

    moved = []
    for ask, a, c, row in zip(asks, asking, queries, rows, strict=True):
      then, slot, entry = a.seek(row, c)

      @pl.when(c.going != 0)
      def _(ask=ask, slot=slot, entry=entry):
        out.found[ask, slot] = entry

      moved.append(gone_on(c, then))
    return gone_on(sinking, after), moved

  turned = (jnp.where(half == 0, z, -z) for z in key)
  start = rules.insert(*turned, token, used, keep), seeking
  any_goes = lambda carry: sum(c.going for c in (carry[0], *carry[1])) != 0
  sinking, seeking = lax.while_loop(any_goes, turn, start)
  out.used[mine], out.merged[mine] = sinking.used, sinking.merged
  for ask, a, c in zip(asks, asking, seeking, strict=True):
    own, count = rules.with_own(c.count, a.own_is_best(c), token, sinking.merged)

    @pl.when(a.second == half)
    def _(ask=ask, c=c, own=own, count=count):
      out.found[ask, c.count], out.count[ask] = own, count


def step(inputs: Inputs, tree: Tree, rules: Rules) -> tuple[Array, Walked]:
  """All keys, each into the trees of its head, and all queries: the nodes, and what was found."""
  trees, asks = inputs.used.shape[0], inputs.queries.shape[0]
  shapes = (trees,), (trees,), (asks, tree.depth), (asks,)
  kernel = hopper.launch_alone(
    "hull_step", functools.partial(_walk, tree=tree, rules=rules), {"tree": trees},
    tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes), params=_LOWERING,
  )  # fmt: skip

  def run(refs):
    nodes, walked = refs
    found = kernel(inputs._replace(nodes=nodes))
    for ref, x in zip(walked, found, strict=True):
      ref[...] = x

  walked = Walked(*(jnp.zeros(shape, jnp.int32) for shape in shapes))
  return pl.run_state(run)((inputs.nodes, walked))
