"""Decoding of nearest-key heads against a scan of all keys in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    ({"max_length": 2**28}, "268435456"),
  ):
    with pytest.raises(ValueError, match=says):
      nearest.init_state(1, **given | options)
