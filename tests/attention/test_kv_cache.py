"""What a cache holds after ragged reads."""

import jax
import jax.numpy as jnp
import numpy as np

import kit
from attention import kv_cache


def test_ragged_rows_lie_in_the_order_of_time_and_what_is_beyond_is_dropped():
  make = kit.keys()
  k, v = kit.normal(next(make), 2, 7, 3, 4), kit.normal(next(make), 2, 7, 3, 5)
  cache = kv_cache.make_cache(
    2, num_kv_heads=3, head_dim=4, value_dim=5, max_length=6, dtype=jnp.float32
  )
  append = jax.jit(kv_cache.append)
  cache, _, _ = append(cache, k[:, :4], v[:, :4], jnp.asarray([4, 1]))
  for i in (4, 5):
    cache, positions, mask = append(cache, k[:, i : i + 1], v[:, i : i + 1], None)
  assert cache.length.tolist() == [6, 3] and positions.tolist() == [[5], [2]]
  seen = np.asarray(mask.as_array(1, 6))[:, 0, 0]
  np.testing.assert_array_equal(seen, [[True] * 6, [True] * 3 + [False] * 3])
  read = ([0, 1, 2, 3, 4, 5], [0, 4, 5])
  for b, tokens in enumerate(read):
    kit.assert_same("keys", cache.key[b, : len(tokens)], k[b, np.array(tokens)])
    kit.assert_same("values", cache.value[b, : len(tokens)], v[b, np.array(tokens)])
  assert not np.asarray(cache.key)[1, 3:].any()
  full, _, _ = append(cache, k[:, 6:], v[:, 6:], None)
  kit.assert_same("a full row", full.key[0], cache.key[0])
