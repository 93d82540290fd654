"""How an op calls a kernel: its own derivative, once, and one element at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import kit
from attention import chips, kernels


class Static(NamedTuple):
  chip: str
  factor: float


def forward(static, operands):
  x, y = operands
  return jnp.vdot(x, x) * static.factor, y


def backward(static, operands, results, gradients):
  """A hundred times the truth, to tell whose derivative runs; none for y."""
  return 200 * static.factor * operands[0] * gradients[0], None


squares = kernels.differentiable_once(forward, backward, instead="write it out")
STATIC = Static("abacus", 3.0)


def test_its_derivative_is_the_one_given():
  x, y = jnp.arange(4.0), jnp.arange(3)
  value, pull = jax.vjp(lambda x: squares(STATIC, (x, y))[0], x)
  assert value == 42
  kit.assert_same("gradient", pull(jnp.float32(1))[0], 600 * x)


def test_a_second_derivative_says_what_has_one():
  first = jax.grad(lambda x: squares(STATIC, (x, jnp.arange(3)))[0])
  with pytest.raises(NotImplementedError, match="'abacus' kernel .* once.*write it out"):
    jax.grad(lambda x: first(x).sum())(jnp.arange(4.0))


def test_each_element_of_a_map_runs_alone():
  """Both passes see one element: this forward sums over all that it is given."""
  x = jnp.arange(8.0).reshape(2, 4)
  f = lambda x: squares(STATIC, (x, jnp.arange(3)))[0]
  kit.assert_same("values", jax.vmap(f)(x), jnp.stack([f(row) for row in x]))
  kit.assert_same("gradients", jax.vmap(jax.grad(f))(x), 600 * x)


def test_a_chip_that_is_not_here_and_a_typed_shard(monkeypatch):
  x = jnp.zeros((8, 2))
  assert "this is cpu" in str(kernels.unsupported("tpu", (x,)))
  monkeypatch.setattr(chips, "current", lambda: chips.Chip("tpu", "TPU v5 lite"))
  assert kernels.unsupported("tpu", (x,)) is None
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  P = jax.sharding.PartitionSpec("data")
  seen = []

  def local(x):
    seen.append(kernels.unsupported("tpu", (x,)))
    return x

  for check in (True, False):
    jax.eval_shape(jax.shard_map(local, mesh=mesh, in_specs=P, out_specs=P, check_vma=check), x)
  assert seen[0] == "inside of shard_map it needs check_vma=False" and seen[-1] is None
