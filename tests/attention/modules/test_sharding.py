"""Logical names on meshes, and the boundary that makes arrays local."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

import kit
from attention.modules import sharding


def mesh(**axes):
  return jax.make_mesh(tuple(axes.values()), tuple(axes))


def test_without_a_mesh_nothing_happens():
  x = jnp.arange(6.0).reshape(2, 3)
  assert sharding.spec("batch", None, "heads") is None
  assert sharding.spec() is None
  assert sharding.like(x) is None
  assert sharding.reshard(x, None) is x
  assert sharding.mesh_axes("heads") == {}
  sharding.check_divisible("width", 7, "embed")
  out = sharding.boundary(lambda x, y: (x.shape, y), (x, None), (None, None), None)
  assert out == ((2, 3), None)


@pytest.mark.parametrize(
  ("axes", "expected"),
  [
    ({"data": 8}, P("data", None, None)),
    ({"data": 2, "sequence": 4}, P("data", "sequence", "sequence")),
    ({"fsdp": 2, "tensor": 2, "sequence": 2}, P("fsdp", "sequence", ("tensor", "sequence"))),
    ({"data": 2, "fsdp": 2, "tensor": 2}, P(("data", "fsdp"), None, "tensor")),
    ({"expert": 8}, P(None, None, None)),
  ],
)
def test_names_mean_what_the_mesh_has(axes, expected):
  with jax.set_mesh(mesh(**axes)):
    assert sharding.spec("batch", "sequence", "heads") == expected
    assert sharding.spec(None, "batch") == P(None, expected[0])


def test_only_explicit_axes_count():
  """Inside `shard_map` axes are manual: a model that runs there must not ask for shardings."""
  with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
    assert sharding.spec("batch") is None
  with jax.set_mesh(mesh(data=2)):
    seen = []
    jax.shard_map(lambda x: seen.append(sharding.spec("batch")) or x, out_specs=P("data"))(
      jnp.zeros(2, out_sharding=P("data"))
    )
    assert seen == [None]


def test_the_boundary_gives_whole_sequences_of_some_heads():
  shapes = []

  def mix(x, ids):  # needs every token: reverses and sums over time
    shapes.append(x.shape)
    return jnp.flip(jnp.cumsum(x, axis=1), 1) * ids[:, :, None]

  x, ids = kit.normal(jax.random.key(0), 4, 8, 4), jnp.arange(32.0).reshape(4, 8)
  loss = lambda x, ids, *specs: jnp.sin(sharding.boundary(mix, (x, ids), specs[:2], specs[2])).sum()
  want, wanted = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, ids, None, None, None)
  with jax.set_mesh(mesh(data=2, tensor=2, sequence=2)):
    heads, tokens = sharding.spec("batch", None, "heads"), sharding.spec("batch")
    x, ids = jax.device_put(x, P("data", "sequence", "tensor")), jax.device_put(ids, P("data"))
    run = jax.jit(jax.value_and_grad(lambda x, ids: loss(x, ids, heads, tokens, heads), (0, 1)))
    got, gotten = run(x, ids)
  assert shapes[-1] == (2, 8, 1)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for name, a, b in zip(("x", "ids"), gotten, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_an_axis_of_the_mesh_that_nobody_uses_does_not_multiply_gradients():
  loss = lambda x, spec: (sharding.boundary(lambda x: x * x, (x,), (spec,), spec)).sum()
  with jax.set_mesh(mesh(data=2, expert=4)):
    x = jnp.arange(4.0, out_sharding=P("data"))
    gradient = jax.jit(jax.grad(lambda x: loss(x, sharding.spec("batch"))))(x)
  np.testing.assert_array_equal(gradient, 2 * np.arange(4.0))


def test_what_does_not_divide_is_named_with_both_numbers():
  with jax.set_mesh(mesh(tensor=2, sequence=4)):
    sharding.check_divisible("num_kv_heads", 8, "heads")
    with pytest.raises(ValueError, match=r"num_kv_heads=4 .* by 8, .* tensor=2 \* sequence=4\.$"):
      sharding.check_divisible("num_kv_heads", 4, "heads")
