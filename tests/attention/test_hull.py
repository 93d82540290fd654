"""The hull's decoding state against a dense scan in NumPy, and that it is updated in place."""

import functools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kit
from attention import hull

T = 300
prefill = jax.jit(hull.prefill, donate_argnums=0)


@pytest.fixture(scope="module", params=["average", "latest"])
def streams(request):
  """Every family in a row of one batch: (ties, queries, keys, values, the state, its outputs)."""
  q, k = zip(*(hardmax_kit.planar(family, T) for family in hardmax_kit.FAMILIES), strict=True)
  rng = np.random.default_rng(1)
  v = rng.integers(-50, 51, (len(q), T, 2)).astype(np.float32)
  v[:, :, 0] = np.arange(T)
  # Two heads read one key head; the second looks the other way.
  asks = np.stack([np.stack(q), -np.stack(q)], axis=2)
  state = fresh(len(q), T, request.param)
  state, out = prefill(state, jnp.asarray(asks), jnp.stack(k)[:, :, None], v[:, :, None])
  return request.param, asks, np.stack(k), v, state, np.asarray(out)


@pytest.mark.parametrize("middle", [0, 4096])
def test_addresses_are_read_up_to_the_bound(middle):
  """Each of 4096 addresses, or of 8192 counted from their middle, written twice in any order: the
  second value is read, exactly.
  """
  rng, count = np.random.default_rng(4), 4096 + middle
  written = np.concatenate([rng.permutation(count), rng.permutation(count)]) + 1
  asked = np.concatenate([written[:count], rng.permutation(count) + 1])
  a, b = ((x - middle).astype(np.float32) for x in (written, asked))
  k, q = np.stack([2 * a, -(a**2)], 1), np.stack([b, np.ones_like(b)], 1)
  v = np.arange(2 * count, dtype=np.float32)
  state = hull.init_state(
    1, num_heads=1, num_kv_heads=1, value_dim=1, max_length=2 * count, ties="latest"
  )
  _, out = prefill(state, *(x[None, :, None] for x in (q, k, v[:, None])))
  memory, read = {}, []
  for t, (address, question) in enumerate(zip(written, asked, strict=True)):
    memory[address] = t
    read.append(memory.get(question, -1))
  known = np.asarray(read) >= 0
  np.testing.assert_array_equal(np.asarray(out)[0, known, 0, 0], np.asarray(read)[known])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_stream_of_integers_is_read_without_regret(data):
  """Few points, so that many are equal, and lines, so that many meet."""
  draw = lambda low, high: data.draw(st.lists(
    st.tuples(*[st.integers(low, high)] * 2),
    min_size=24, max_size=24,
  ))  # fmt: skip
  q, k = (np.array(draw(*ends), np.float32) for ends in ((-3, 3), (-4, 4)))
  if data.draw(st.booleans()):
    k = k[:, :1] * np.array([[2, -1]], np.float32)
  state = hull.init_state(1, num_heads=1, num_kv_heads=1, value_dim=1, max_length=24, ties="latest")
  tokens = np.arange(24, dtype=np.float32)[None, :, None, None]
  _, out = prefill(state, q[None, :, None], k[None, :, None], tokens)
  read = np.asarray(out)[0, :, 0, 0].astype(int)
  np.testing.assert_array_equal((q * k[read]).sum(1), hardmax_kit.scan(q, k).score)


def fresh(batch, room, ties="average"):
  return hull.init_state(
    batch, num_heads=2, num_kv_heads=1, value_dim=2, max_length=room, ties=ties
  )


@pytest.mark.parametrize("family", range(5), ids=hardmax_kit.FAMILIES)
@pytest.mark.parametrize("head", [0, 1], ids=["ahead", "turned"])
def test_it_reads_what_a_dense_scan_reads(streams, family, head):
  ties, q, k, v, _, out = streams
  q, k, v, out = q[family, :, head], k[family], v[family], out[family, :, head]
  want = hardmax_kit.scan(q, k)
  if ties == "latest":
    chosen = out[:, 0].astype(int)
    regret = hardmax_kit.relative_regret(q, k, chosen)
    exact = hardmax_kit.FAMILIES[family] not in ("gaussian", "circle")
    assert regret <= (0 if exact else 2e-7)
    if exact:
      np.testing.assert_array_equal(out, v[want.last])
  else:
    np.testing.assert_allclose(out, want.average(v), rtol=1e-6, atol=1e-5)


def test_tokens_one_by_one_ragged_and_beyond_the_capacity():
  """Padding leaves no trace, a step is a prefill of one, and what has no room is not kept."""
  rng = np.random.default_rng(2)
  q, k = rng.integers(-3, 4, (2, 2, 12, 1, 2)).astype(np.float32)
  q, v = np.repeat(q, 2, axis=2), rng.normal(size=(2, 12, 1, 2)).astype(np.float32)
  _, whole = prefill(fresh(2, 12), q, k, v)
  state, head = jax.jit(hull.prefill)(fresh(2, 12), q, k, v, lengths=jnp.array([12, 5]))
  np.testing.assert_array_equal(head[1, :5], whole[1, :5])
  np.testing.assert_array_equal(head[1, 5:], 0)
  assert state.length.tolist() == [12, 5]
  state, step = fresh(2, 8), jax.jit(hull.step)
  for t in range(12):
    state, out = step(state, q[:, t], k[:, t], v[:, t])
    if t < 8:
      np.testing.assert_array_equal(out, whole[:, t])
    else:
      for row in range(2):
        want = hardmax_kit.scan(q[row, t : t + 1, 0], k[row, :8, 0], causal=False)
        np.testing.assert_allclose(
          out[row, 0], want.average(v[row, :8, 0])[0], rtol=1e-5, atol=1e-6
        )


def test_over_heads_changes_nothing_and_copies_no_tree():
  """Two devices with two key heads each, against all in one place: a prefill, and then a step."""
  mesh = jax.make_mesh((2,), ("heads",), devices=jax.devices()[:2])
  decode = hull.over_heads(mesh, "heads")
  rng, given = np.random.default_rng(6), {"num_heads": 8, "num_kv_heads": 4, "value_dim": 2}
  q = rng.integers(-3, 4, (2, 9, 8, 2)).astype(np.float32)
  k, v = rng.integers(-3, 4, (2, 2, 9, 4, 2)).astype(np.float32)
  lengths, outputs = jnp.array([8, 5]), []
  for functions in (decode, hull):
    state = functions.init_state(2, max_length=1000, ties="latest", **given)
    read = jax.jit(functions.prefill, donate_argnums=0)
    program = read.lower(state, q[:, :8], k[:, :8], v[:, :8], lengths=lengths).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < memory.alias_size_in_bytes / 4
    state, out = read(state, q[:, :8], k[:, :8], v[:, :8], lengths=lengths)
    state, last = jax.jit(functions.step)(state, q[:, 8], k[:, 8], v[:, 8])
    outputs.append((out, last, state.length))
  for one, other in zip(*outputs, strict=True):
    np.testing.assert_array_equal(one, other)
  with pytest.raises(ValueError, match="num_kv_heads=3 must be a multiple of 2, .* 'heads'"):
    decode.init_state(1, num_heads=6, num_kv_heads=3, value_dim=2, max_length=4)
  with pytest.raises(ValueError, match="no axis 'head', but heads"):
    hull.over_heads(mesh, "head")


@pytest.mark.parametrize("heads", [1, 126])
def test_the_state_is_updated_in_place_by_native_loops(heads):
  """What a scan of steps needs beside its donated state does not grow with the capacity, and XLA
  makes one function of every walk, however large the arrays are: it counts bytes in float32.
  """
  x = jax.ShapeDtypeStruct((1, 4, heads, 2), jnp.float32)
  needs, native = [], []
  for room in (1000, 1_000_000):
    make = functools.partial(
      hull.init_state, 1, num_heads=heads, num_kv_heads=heads, value_dim=2, max_length=room
    )
    state = jax.eval_shape(make)
    program = prefill.lower(state, x, x, x).compile()
    memory = program.memory_analysis()
    needs.append(memory.temp_size_in_bytes)
    native.append(program.as_text().count('xla_cpu_small_call="true"'))
    assert memory.alias_size_in_bytes >= state.nodes.size * 4 + state.entries.size * 4
  assert needs[1] <= needs[0] + 1024, needs
  assert native[0] == native[1] >= 9, native


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"head_dim": 3}, "head_dim=3"),
    ({"ties": "first"}, "'first'"),
    ({"num_kv_heads": 2}, "num_kv_heads=2"),
    ({"num_kv_heads": 0}, "num_kv_heads=0 must divide num_heads=3"),
    ({"max_length": 2**28}, "268435456"),
    ({"dtype": jnp.bfloat16}, "bfloat16"),
  ],
)
def test_what_cannot_be_is_refused(options, says):
  given = {"num_heads": 3, "num_kv_heads": 1, "value_dim": 2, "max_length": 4} | options
  with pytest.raises(ValueError, match=says):
    hull.init_state(1, **given)


def test_float64_elsewhere_changes_nothing():
  """Where JAX counts in int64 and makes float64, the state and its loops stay as they are."""
  q, k = hardmax_kit.planar("grid", 20)
  v = np.random.default_rng(0).integers(-50, 51, (20, 2)).astype(np.float32)
  with kit.double():
    state = hull.init_state(1, num_heads=1, num_kv_heads=1, value_dim=2, max_length=20)
    state, out = jax.jit(hull.prefill)(state, *(x[None, :, None] for x in (q, k, v)))
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"int32", "float32"}
  np.testing.assert_allclose(out[0, :, 0], hardmax_kit.scan(q, k).average(v), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
  "shapes",
  [((2, 3, 2, 2), (2, 3, 1, 2), (2, 3, 1, 4)), ((2, 3, 2, 2), (2, 3, 1, 3), (2, 3, 1, 2)),
   ((2, 3, 2, 4), (2, 3, 1, 2), (2, 3, 1, 2)), ((2, 3, 4, 2), (2, 3, 2, 2), (2, 3, 2, 2)),
   ((2, 3, 2, 2), (2, 4, 1, 2), (2, 4, 1, 2)), ((1, 3, 2, 2), (1, 3, 1, 2), (1, 3, 1, 2))],
  ids=["h", "H of k", "H of q", "K", "T", "B"],
)  # fmt: skip
def test_tokens_that_do_not_fit_the_state_are_refused(shapes):
  prompt = [np.zeros(shape, np.float32) for shape in shapes]
  with pytest.raises(ValueError, match="with B=2, K=1, H=2 and h=2 as in the state") as error:
    hull.prefill(fresh(2, 4), *prompt)
  assert all(str(list(shape)) in str(error.value) for shape in shapes)
  if len({shape[1] for shape in shapes}) == 1:
    with pytest.raises(ValueError, match=r"must be \[B, N, H\], .* and K a divisor of N, not"):
      hull.step(fresh(2, 4), *(x[:, 0] for x in prompt))
