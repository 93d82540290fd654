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


class NoTree:
  """A feature map that JAX does not know."""

  def __call__(self, x, *, positions=None, is_query):
    return x

  def num_features(self, head_dim):
    return head_dim


def test_wrong_tokens_say_what_is_wrong():
  q, k, v = (x[:, 0] for x in tokens(1))
  state = linear.init_state(B, num_heads=N, num_kv_heads=K, head_dim=H, value_dim=h, max_length=9)
  calls = [
    ((q, k, v[..., :1]), None, r"v of one token must be \[B=2 heads 5\].*got \(2, 2, 1\)"),
    ((q[:1], k[:1], v[:1]), None, r"q of one token must be \[B=2 .* got \(1, 4, 8\)"),
    ((q[:, :3], k, v), None, r"the heads a divisor of 4, .* got \(2, 3, 8\)"),
    ((q, k[..., :7], v), None, r"k of one token must be \[B=2 heads 8\].*got \(2, 2, 7\)"),
    ((q[..., :7], k[..., :7], v), None, "the state has 8 features, .* width 7, which makes 7"),
    ((q, k, v), jnp.zeros((B, 1, N)), r"log_decay must be .* \(2, 4\) or .* got \(2, 1, 4\)"),
  ]
  for token, g, message in calls:
    with pytest.raises(ValueError, match=message):
      linear.step(state, *token, log_decay=g)
  with pytest.raises(ValueError, match=r"initial_state.kv must be .*\(1, 4, .* got \(2, 4, 8, 5\)"):
    linear.prefill(state, *(x[:1, None] for x in (q, k, v)))
  with pytest.raises(ValueError, match="room for max_length=8 tokens, got 9"):
    linear.init_state(
      B, num_heads=N, num_kv_heads=K, head_dim=H, value_dim=h, max_length=9,
      feature_map=feature_maps.cosformer(8),
    )  # fmt: skip


def test_wrong_calls_say_what_is_wrong():
  q, k, v = tokens(8)
  state = linear.State(jnp.zeros((B, N, H, h)), jnp.zeros((B, N, H)))
  calls = [
    ({"chunk_size": 48}, "chunk_size must be a power of two, got 48"),
    (
      {"log_decay": jnp.zeros((B, 8))},
      r"log_decay must be an array of shape \(4,\) or .* got \(2, 8\)",
    ),
    ({"log_decay": -0.1}, r"log_decay must be an array of shape \(4,\) or .* got a float"),
    ({"segment_ids": jnp.zeros((B, 9), int)}, r"segment_ids must be .*\(2, 8\), got \(2, 9\)"),
    ({"bidirectional": True, "return_state": True}, "bidirectional=True .* return_state=True"),
    ({"reverse": True, "lengths": jnp.ones((B,), int)}, "lengths pads the end"),
    (
      {"initial_state": state, "feature_map": "taylor"},
      r"initial_state.kv .*45.* got \(2, 4, 8, 5\)",
    ),
    ({"initial_state": tuple(state)}, r"initial_state must be a State\(kv, z\), got a tuple"),
    ({"feature_map": "elu"}, "feature_map must be one of .* got 'elu'"),
    ({"feature_map": feature_maps.cosformer(7)}, "room for max_length=7 tokens, got 8"),
    ({"feature_map": "favor"}, "only normalize=True cancels; got normalize=False"),
    ({"feature_map": NoTree()}, "must be a pytree, .* got a NoTree"),
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
  with pytest.raises(ValueError, match="q must be real, got complex64"):
    linear_attention(q.astype(complex), k, v)
  with pytest.raises(ValueError, match=r"v must be \[B=2 T=8 K h\]"):
    linear_attention(q, k, v[:, :7])
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(lambda q: linear_attention(q, k, v), (q,), (q,))
