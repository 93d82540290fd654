"""What is wrong with a call of `linear_attention` is said, with both values in it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from attention import feature_maps
from attention.ops import linear

linear_attention: Any = linear.linear_attention  # some tests call it wrongly
B, N, K, H, h = 2, 4, 2, 8, 5


def tokens(T):
  return jnp.ones((B, T, N, H)), jnp.ones((B, T, K, H)), jnp.ones((B, T, K, h))


def test_wrong_calls_say_what_is_wrong():
  q, k, v = tokens(8)
  state = linear.State(jnp.zeros((B, N, H, h)), jnp.zeros((B, N, H)))
  calls = [
    ({"chunk_size": 48}, "chunk_size must be a power of two, got 48"),
    ({"log_decay": jnp.zeros((B, 8))}, r"log_decay must be of shape \(4,\) or .* got \(2, 8\)"),
    ({"segment_ids": jnp.zeros((B, 9), int)}, r"segment_ids must be .*\(2, 8\), got \(2, 9\)"),
    ({"bidirectional": True, "return_state": True}, "bidirectional=True .* return_state=True"),
    ({"reverse": True, "lengths": jnp.ones((B,), int)}, "lengths pads the end"),
    (
      {"initial_state": state, "feature_map": "taylor"},
      r"initial_state.kv .*45.* got \(2, 4, 8, 5\)",
    ),
    ({"feature_map": "elu"}, "feature_map must be one of .* got 'elu'"),
    ({"feature_map": feature_maps.cosformer(7)}, "max_length must be at least .* got 7 < 8"),
    ({"implementation": "chunky"}, "did you mean 'chunked'"),
  ]
  for options, message in calls:
    with pytest.raises(ValueError, match=message):
      linear_attention(q, k, v, **options)
  with pytest.raises(ValueError, match="q's 3 and v's 2: got k with 2 and N=3"):
    linear_attention(q[:, :, :3], k, v)
  with pytest.raises(ValueError, match="q's 3 and v's 4: got q with 3 and N=4"):
    linear_attention(q[:, :, :3], k, jnp.concatenate([v, v], axis=2))
  with pytest.raises(ValueError, match=r"k must be \[B=2 T=8 K H=8\]"):
    linear_attention(q, k[:, :7], v)
  with pytest.raises(ValueError, match=r"v must be \[B=2 T=8 K h\]"):
    linear_attention(q, k, v[:, :7])
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(lambda q: linear_attention(q, k, v), (q,), (q,))
