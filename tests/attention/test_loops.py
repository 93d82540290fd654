"""Under shard_map, with its checks on: loops are accepted and replicated inputs get summed
gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kit
from attention import (
  direction_grid_attention,
  dot_product_attention,
  fenwick_attention,
  hardmax_attention,
  loops,
  top_k_attention,
)


def test_zero_is_zero_whatever_it_came_from():
  x = jnp.full((2, 3), jnp.nan)
  assert loops.zero((x, jnp.zeros((2,), jnp.int32))) == 0.0
  assert loops.zero(()) == 0.0
  kit.assert_same("together", loops.together({"a": jnp.ones(3)})["a"], jnp.ones(3))


@pytest.mark.parametrize("implementation", ["xla", "tiled"])
def test_gradients_of_what_devices_share(implementation):
  """Queries and slopes are cut by head, the one key head is whole on every device."""
  mesh = jax.make_mesh((4, 2), ("rows", "heads"))
  q, k, v = kit.Case(B=4, T=40, S=40, K=1).inputs()
  slopes = jnp.array([0.1, 0.2, 0.3, 0.4])
  specs = (P("rows", None, "heads"), P("rows"), P("rows"), P("heads"))

  def attend(q, k, v, slopes):
    return dot_product_attention(
      q, k, v, is_causal=True, alibi_slopes=slopes, implementation=implementation
    )

  sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0])

  def gradients(attend, arrays):
    loss = lambda *x: (attend(*x) ** 2).sum()
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

  arrays = (q, k, v, slopes)
  placed = [
    jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)
  ]
  actual = jax.tree.map(np.asarray, gradients(sharded, placed))
  kit.assert_trees_close(actual, gradients(attend, arrays), factor=10)


HARD = {
  "bulk": lambda q, k, v: hardmax_attention(q, k, v, is_causal=True, implementation="bulk"),
  "hulls": lambda q, k, v: top_k_attention(
    q, k, v, top_k=3, is_causal=True, implementation="hulls"
  )[0],
  "fenwick": lambda q, k, v: fenwick_attention(q, k, v)[0],
  "grid": lambda q, k, v: direction_grid_attention(
    *(jnp.pad(x, [(0, 0)] * 3 + [(0, 1)], constant_values=1) for x in (q, k)), v, cells=2
  )[0],
}


@pytest.mark.parametrize("name", HARD)
def test_hard_reads_of_what_devices_share(name):
  """Queries are cut by head, the one key head is whole on both devices; integers tie, and some
  queries look along an axis.
  """
  make = kit.keys()
  q, k, v = (
    kit.normal(next(make), 1, 70, heads, width) for heads, width in ((2, 2), (1, 2), (1, 3))
  )
  q, k = jnp.round(2 * q), jnp.round(2 * k)
  assert (q[..., 1] == 0).any(), "or nothing is shown"
  mesh, cut = jax.make_mesh((2,), ("heads",), devices=jax.devices()[:2]), P(None, None, "heads")
  sharded = jax.shard_map(HARD[name], mesh=mesh, in_specs=(cut, P(), P()), out_specs=cut)

  @functools.partial(jax.jit, static_argnums=0)
  def run(attend, q, k, v):
    out, pull = jax.vjp(lambda v: attend(q, k, v), v)
    return out, pull(jnp.sin(out))[0]

  placed = (
    jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in ((q, cut), (k, P()), (v, P()))
  )
  actual = jax.tree.map(np.asarray, run(sharded, *placed))
  kit.assert_trees_close(actual, run(HARD[name], q, k, v))
