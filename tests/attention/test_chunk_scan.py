"""The parts of the scan over chunks; what they make together is asked in ops/test_linear.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import chunk_scan, linear_attention


def test_divide_by_nothing_is_nothing_with_no_gradient():
  x, weight = jnp.array([3.0, 5.0]), jnp.array([2.0, 0.0])
  np.testing.assert_array_equal(chunk_scan.divide(x, weight), [1.5, 0.0])
  dx, dw = jax.grad(lambda *a: chunk_scan.divide(*a).sum(), argnums=(0, 1))(x, weight)
  np.testing.assert_array_equal(dx, [0.5, 0.0])
  np.testing.assert_array_equal(dw, [-0.75, 0.0])


def test_cut_pads_the_last_chunk():
  x = jnp.arange(10.0).reshape(2, 5)
  pieces = chunk_scan.cut(x, 4)
  np.testing.assert_array_equal(pieces[1], [[4, 0, 0, 0], [9, 0, 0, 0]])
  np.testing.assert_array_equal(chunk_scan.cut(x, 4, mode="edge")[1, 1], [9, 9, 9, 9])


def test_groups_are_cut_and_joined():
  """Chunks of a group stand beside each other, as rows of the batch, in order."""
  x = jnp.arange(20.0).reshape(2, 10)
  groups = chunk_scan.cut(x, 2, 3)
  assert groups.shape == (2, 6, 2)
  np.testing.assert_array_equal(groups[0], [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13], [14, 15]])
  np.testing.assert_array_equal(chunk_scan.join(groups, 2)[:, :10], x)


def test_a_group_fits_the_cache_and_pads_little():
  size = lambda T, numbers: chunk_scan.group_size(T, 64, numbers)
  assert [size(T, 1) for T in (0, 1, 64, 65, 512, 513, 600)] == [1, 1, 1, 2, 8, 5, 5]
  assert [size(10_000, n) for n in (2**13, 2**15, 2**17, 2**19)] == [8, 4, 1, 1]


@pytest.mark.parametrize(("width", "kept"), [(8, True), (64, False)])
def test_entering_states_are_kept_where_they_are_few(width, kept, monkeypatch):
  """And the gradients are those of states that are made again."""
  q, k, v, c = jax.random.normal(jax.random.key(0), (4, 1, 1200, 2, width)) / 4
  g = -jnp.exp(jax.random.normal(jax.random.key(1), (1, 1200, 2)))
  initial = chunk_scan.State(jnp.ones((1, 2, width, width)), jnp.ones((1, 2, width)))

  def attend(q, k, v, g, initial):
    return linear_attention(
      q, k, v, log_decay=g, initial_state=initial, chunk_size=16, implementation="chunked"
    )

  def gradients():
    jax.clear_caches()
    _, pull = jax.vjp(attend, q, k, v, g, initial)
    return sum(x.nbytes for x in jax.tree.leaves(pull)), pull(c)

  size, got = gradients()
  monkeypatch.setattr(chunk_scan, "_KEPT_STATES", 0 if kept else 100)
  other, want = gradients()
  assert (size > other) == kept and abs(size - other) > 4 * initial.kv.nbytes
  assert not kept or size - other <= 3 * q.nbytes / 8 + 4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_full_decay_of_each_form():
  shape = (2, 3, 4)
  per_head = chunk_scan.full_decay(jnp.arange(4.0), shape)
  assert per_head.shape == (2, 3, 4, 1) and per_head[1, 2, 3, 0] == 3
  assert chunk_scan.full_decay(jnp.zeros(shape), shape).shape == (2, 3, 4, 1)
  assert chunk_scan.full_decay(jnp.zeros((*shape, 5)), shape).shape == (2, 3, 4, 5)
  assert chunk_scan.full_decay(None, shape) is None


def test_padding_begins_no_document():
  ids, lengths = jnp.array([[0, 0, 1, 7, 7]], jnp.int32), jnp.array([3], jnp.int32)
  marks = chunk_scan.make_marks((1, 5), 4, 1, None, lengths, ids)
  np.testing.assert_array_equal(marks.runs[:, 0], [[0, 0, 1, 1], [1, 1, 1, 1]])
  np.testing.assert_array_equal(marks.before[:, 0], [0, 1])
  np.testing.assert_array_equal(marks.keep[:, 0], [[1, 1, 1, 0], [0, 0, 0, 0]])


def test_a_chunk_of_padding_continues_the_last_document():
  """Or the state that it hands on would be lost."""
  marks = chunk_scan.make_marks((1, 5), 2, 2, None, None, jnp.array([[0, 0, 0, 0, 1]], jnp.int32))
  np.testing.assert_array_equal(marks.runs, [[[0, 0], [0, 0]], [[1, 1], [1, 1]]])
  np.testing.assert_array_equal(marks.before, [[0, 0], [0, 1]])


@pytest.mark.parametrize("spec", [jax.P("x"), jax.P(None, None, "x")], ids=["batch", "heads"])
def test_what_a_mesh_cuts_stays_where_it_is(spec):
  """Batch or heads of a jitted call are cut by 8: no device asks another for what it holds."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  x = jax.ShapeDtypeStruct((8, 520, 8, 8), jnp.float32, sharding=jax.NamedSharding(mesh, spec))

  def loss(q, k, v, g):
    out = linear_attention(q, k, v, log_decay=g, implementation="chunked", chunk_size=64)
    return (out * jnp.cos(out)).sum()

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, x, x, x).compile()
  assert "all-gather" not in compiled.as_text()
  assert "all-to-all" not in compiled.as_text()
  for gradient in compiled.output_shardings:
    assert gradient.shard_shape(x.shape) == x.sharding.shard_shape(x.shape)
