"""Parts of rows and heads: against NumPy's indices, and which of them go side by side."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from attention import parts
from attention.parts import Part


@pytest.mark.parametrize("side", [1, 2, 3, 6])
@pytest.mark.parametrize("width", [1, 2])
def test_take_and_put(side, width):
  """Of 6 units, each `width` long, one of each of `side` runs; an axis of length 1 is shared."""
  x = jax.random.normal(jax.random.key(0), (2, 6 * width, 1, 3))
  layout = "B K T"
  units = np.arange(6 * width).reshape(side, 6 // side, width)
  for index in range(6 // side):
    cut = {"K": Part(6, side, jnp.int32(index)), "T": Part(4, 1, jnp.int32(2)), "other": None}
    at = units[:, index].reshape(-1)
    taken = jax.jit(lambda x, cut=cut: parts.take(x, layout, cut))(x)
    np.testing.assert_array_equal(taken, x[:, at])
    put = jax.jit(lambda x, new, cut=cut: parts.put(x, layout, cut, new))(x, -taken)
    np.testing.assert_array_equal(put, x.at[:, at].multiply(-1))
    added = parts.add(x, layout, cut, taken)
    np.testing.assert_array_equal(added, x.at[:, at].multiply(2))


def test_parts_are_a_partition():
  x = jnp.arange(12)
  seen = [parts.take(x, "K", {"K": Part(12, 4, i)}) for i in range(3)]
  np.testing.assert_array_equal(np.sort(np.concatenate(seen)), x)


@pytest.mark.parametrize(
  ("units", "least", "most", "side"),
  [
    (8, 1, 8, 8),
    (8, 1, 5, 4),
    (8, 1, 0, 1),
    (8, 2, 1, 2),  # A mesh of two: never less.
    (12, 8, 6, 4),  # Two devices of the eight cannot be used, four can.
    (12, 4, 11, 4),
    (7, 2, 3, 1),
  ],
)
def test_side(units, least, most, side):
  assert parts.side(units, least, most) == side


def test_devices_are_those_that_may_still_cut():
  assert parts.devices() is None
  mesh = jax.make_mesh((2, 4), ("rows", "heads"))
  with jax.set_mesh(mesh):
    assert parts.devices() == 8
    seen = []

    def local(x):
      seen.append(parts.devices())
      return x

    jax.shard_map(local, in_specs=jax.P("rows"), out_specs=jax.P("rows"), axis_names={"rows"})(
      jax.device_put(jnp.zeros(8), jax.P("rows"))
    )
    assert seen == [4]


@pytest.mark.parametrize("cut", [False, True])
def test_each_runs_every_row_and_head(cut):
  """Of 4 rows and 6 heads one wants a branch: of its part, which a mesh of 8 has of all rows and of
  two heads, all take it.
  """
  x = jnp.arange(4 * 6 * 5.0).reshape(4, 6, 5)
  wants = np.zeros((4, 6), bool)
  wants[1, 2] = True

  def one(row, wants):
    return 2 * row, lax.cond(parts.anywhere(wants), lambda: True, lambda: False)

  with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"))) if cut else contextlib.nullcontext():
    twice, took = jax.jit(lambda *arrays: parts.each(one, *arrays))(x, wants)
  np.testing.assert_array_equal(twice, 2 * x)
  if cut:
    wants[:, [2, 5]] = True
  np.testing.assert_array_equal(took, wants)


def test_read():
  """Of 4 heads two read one of 2: what lies at their tokens, some of them or one."""
  x, index = jax.random.normal(jax.random.key(0), (3, 7, 2, 5)), np.arange(3 * 6 * 4 * 2) % 7
  index = index.reshape(3, 6, 4, 2)
  rows, heads = np.arange(3)[:, None, None, None], np.array([0, 0, 1, 1])[:, None]
  np.testing.assert_array_equal(parts.read(x, index), x[rows, index, heads])
  np.testing.assert_array_equal(parts.read(x, index[..., 0]), parts.read(x, index)[..., 0, :])


@pytest.mark.parametrize("k", [1, 2, 9])
def test_top_k_of_equal_ones_takes_the_first(k):
  x = jnp.round(2 * jax.random.normal(jax.random.key(0), (3, 50, 40)))
  x = x.at[0].set(-jnp.inf).at[1, :, 7:].set(-jnp.inf)
  for one, another in zip(parts.top_k(x, k), lax.top_k(x, k), strict=True):
    np.testing.assert_array_equal(one, another)
    assert one.dtype == another.dtype
