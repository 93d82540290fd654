"""Decoding of nearest-key heads against a scan of all keys in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import nearest

T = 300
prefill = jax.jit(nearest.prefill, donate_argnums=0)


def scan(q, k, v, ties):
  """What each query of one head reads, float64."""
  far = np.abs(q.astype(np.float64)[:, None] - k.astype(np.float64)[None])
  far = np.where(np.tri(len(k), dtype=bool), far, np.inf)
  tied = far == far.min(1, keepdims=True)
  if ties == "latest":
    return v[np.where(tied, np.arange(len(k)), -1).max(1)]
  return tied @ v.astype(np.float64) / tied.sum(1)[:, None]


def numbers(kind, rng):
  """Queries and keys, so that many are equal, or great integers."""
  if kind == "few":
    return rng.integers(-9, 10, (2, T)) / np.float32(2)
  if kind == "great":
    return rng.integers(2**24 - 400, 2**24, (2, T)) * rng.choice([-1, 1], (2, T))
  raise ValueError(kind)


@pytest.mark.parametrize("ties", ["average", "latest"])
@pytest.mark.parametrize("kind", ["few", "great"])
def test_it_reads_what_a_scan_reads(kind, ties):
  """Three rows of a batch, two query heads for a key head, one of them turned."""
  rng = np.random.default_rng(0)
  pairs = np.stack([numbers(kind, rng) for _ in range(3)]).astype(np.float32)
  q, k = pairs[:, 0], pairs[:, 1]
  v = rng.integers(-50, 51, (3, T, 2)).astype(np.float32)
  state = nearest.init_state(3, num_heads=2, num_kv_heads=1, value_dim=2, max_length=T, ties=ties)
  asks = np.stack([q, -q], axis=2)[..., None]
  _, out = prefill(state, asks, k[:, :, None, None], v[:, :, None])
  for row in range(3):
    for head, sign in enumerate((1, -1)):
      want = scan(sign * q[row], k[row], v[row], ties)
      np.testing.assert_allclose(out[row, :, head], want, rtol=1e-6, atol=1e-6)


def test_numbers_of_all_sizes():
  """From 1e-30 to 1e30 and 0: what is read is as near as the nearest, to float32's rounding."""
  rng = np.random.default_rng(1)
  sizes = 10.0 ** rng.integers(-30, 30, (2, 3, T)) * (rng.random((2, 3, T)) > 0.1)
  q, k = (rng.normal(size=(2, 3, T)) * sizes).astype(np.float32)
  state = nearest.init_state(
    3, num_heads=2, num_kv_heads=1, value_dim=2, max_length=T, ties="latest"
  )
  asks = np.stack([q, -q], axis=2)[..., None]
  _, out = prefill(state, asks, k[:, :, None, None], np.stack([k, k], -1)[:, :, None])
  far = np.abs(asks.astype(np.float64) - k.astype(np.float64)[:, None, None])
  far = np.where(np.tri(T, dtype=bool)[None, :, None], far, np.inf).min(-1)
  found = np.abs(asks[..., 0].astype(np.float64) - np.asarray(out)[..., 0])
  assert (found <= far * (1 + 1e-6)).all()


def test_sorted_streams_stay_shallow_and_great_addresses_exact():
  """In ascending order, 2^24 at the end, where a parabola would have lost its addresses."""
  a = (np.arange(400) + 2**24 - 400).astype(np.float32)
  state = nearest.init_state(1, num_heads=1, num_kv_heads=1, value_dim=1, max_length=400)
  v = np.arange(400, dtype=np.float32)
  _, out = prefill(state, *(x[None, :, None, None] for x in (np.flip(a), a, v)))
  asked = 399 - np.arange(400)  # later ones are not there yet: the newest is nearest
  np.testing.assert_array_equal(out[0, :, 0, 0], np.minimum(asked, np.arange(400)))


def test_tokens_one_by_one_ragged_and_beyond_the_capacity():
  rng = np.random.default_rng(2)
  q, k = rng.integers(-3, 4, (2, 2, 12, 1, 1)).astype(np.float32)
  v = rng.normal(size=(2, 12, 1, 2)).astype(np.float32)
  fresh = lambda room: nearest.init_state(
    2, num_heads=1, num_kv_heads=1, value_dim=2, max_length=room
  )
  _, whole = prefill(fresh(12), q, k, v)
  state, head = jax.jit(nearest.prefill)(fresh(12), q, k, v, lengths=jnp.array([12, 5]))
  np.testing.assert_array_equal(head[1, :5], whole[1, :5])
  np.testing.assert_array_equal(head[1, 5:], 0)
  assert state.length.tolist() == [12, 5]
  state, step = fresh(8), jax.jit(nearest.step)
  for t in range(12):
    state, out = step(state, q[:, t], k[:, t], v[:, t])
    if t < 8:
      np.testing.assert_array_equal(out, whole[:, t])
    else:
      keys, values = k[0, :8, 0, 0], v[0, :8, 0]
      far = np.abs(q[0, t, 0, 0] - keys)
      want = values[far == far.min()].mean(0)
      np.testing.assert_allclose(out[0, 0], want, rtol=1e-5, atol=1e-6)


def test_the_state_is_updated_in_place_by_native_loops():
  x = jax.ShapeDtypeStruct((1, 4, 8, 1), jnp.float32)
  needs, native = [], []
  for room in (1000, 1_000_000):
    state = jax.eval_shape(
      lambda room=room: nearest.init_state(
        1, num_heads=8, num_kv_heads=8, value_dim=1, max_length=room
      )
    )
    program = prefill.lower(state, x, x, x).compile()
    needs.append(program.memory_analysis().temp_size_in_bytes)
    native.append(program.as_text().count('xla_cpu_small_call="true"'))
  assert needs[1] <= needs[0] + 1024, needs
  assert native[0] == native[1] >= 4, native


def test_positions_are_one_gather():
  rng = np.random.default_rng(5)
  v = rng.normal(size=(2, 9, 2, 3)).astype(np.float32)
  q = rng.uniform(-2, 11, (2, 5, 4)).astype(np.float32)
  out = nearest.at_positions(v, q, jnp.array([9, 4]))
  for b, n in ((0, 9), (1, 4)):
    at = np.abs(q[b][..., None] - np.arange(n)).argmin(-1)
    np.testing.assert_array_equal(out[b], v[b, at, np.arange(4) // 2])
  assert not np.asarray(nearest.at_positions(v, q, 0)).any()


def test_what_cannot_be_is_refused():
  given = {"num_heads": 2, "num_kv_heads": 1, "value_dim": 2, "max_length": 4}
  for options, says in (
    ({"ties": "first"}, "'first'"),
    ({"num_kv_heads": 3}, "num_kv_heads=3"),
    ({"num_kv_heads": 0}, "num_kv_heads=0 must divide num_heads=2"),
    ({"max_length": 2**28}, "268435456"),
  ):
    with pytest.raises(ValueError, match=says):
      nearest.init_state(1, **given | options)


def test_float64_elsewhere_changes_nothing_and_what_has_no_room_is_not_kept():
  """With one head, in the place behind its last node lies what is nobody's. Where JAX counts in
  int64, loops do not.
  """
  with kit.double():
    state = nearest.init_state(1, num_heads=1, num_kv_heads=1, value_dim=1, max_length=3)
    x = jnp.arange(1.0, 7.0, dtype=jnp.float32)[None, :, None, None]
    state, out = jax.jit(nearest.prefill)(state, x, x, 10 * x)
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"uint32", "int32", "float32"}
  np.testing.assert_array_equal(out[0, :, 0, 0], [10, 20, 30, 30, 30, 30])


def test_positions_beyond_the_integers_of_float32():
  """Float32 holds even numbers there; the last place is held by none."""
  v = np.zeros((1, 17_000_000, 1, 1), np.int8)
  v[0, [2**24, 16_900_000, 16_999_999], 0, 0] = [1, 2, 3]
  q = jnp.asarray([[[2.0**24], [16_900_000.0], [16_999_998.0], [17e6], [1e30], [jnp.nan], [-1.0]]])
  out = nearest.at_positions(v, q, v.shape[1])
  np.testing.assert_array_equal(out[0, :, 0, 0], [1, 2, 0, 3, 3, 0, 0])


@pytest.mark.parametrize(
  "shapes",
  [((1, 4, 2, 1), (1, 4, 1, 1), (1, 4, 1, 3)), ((1, 4, 2, 1), (1, 4, 1, 2), (1, 4, 1, 2)),
   ((1, 4, 2, 2), (1, 4, 1, 1), (1, 4, 1, 2)), ((1, 4, 2, 1), (1, 4, 2, 1), (1, 4, 2, 2)),
   ((2, 4, 2, 1), (2, 4, 1, 1), (2, 4, 1, 2)), ((1, 4, 2, 1), (1, 3, 1, 1), (1, 3, 1, 2))],
  ids=["h", "H of k", "H of q", "K", "B", "T"],
)  # fmt: skip
def test_tokens_that_do_not_fit_the_state_are_refused(shapes):
  state = nearest.init_state(1, num_heads=2, num_kv_heads=1, value_dim=2, max_length=4)
  prompt = [jnp.zeros(shape) for shape in shapes]
  with pytest.raises(ValueError, match="with B=1, K=1, H=1 and h=2 as in the state"):
    nearest.prefill(state, *prompt)
  if len({shape[1] for shape in shapes}) == 1:
    with pytest.raises(ValueError, match=r"must be \[B, N, H\], .* and K a divisor of N, not"):
      nearest.step(state, *(x[:, 0] for x in prompt))


def test_query_heads_are_a_multiple_of_key_heads():
  state = nearest.init_state(1, num_heads=2, num_kv_heads=2, value_dim=2, max_length=4)
  with pytest.raises(ValueError, match=r"K=2, H=1 and h=2 .* a divisor of N, not \[1, 4, 3, 1\]"):
    nearest.prefill(
      state, jnp.zeros((1, 4, 3, 1)), jnp.zeros((1, 4, 2, 1)), jnp.zeros((1, 4, 2, 2))
    )
