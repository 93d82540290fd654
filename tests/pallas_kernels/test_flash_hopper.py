"""The Hopper kernels, interpreted with their barriers, rings, warpgroups and a race detector that
fails on a race, against softmax attention in float64: every result and every gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kit import Call, causal, check, half
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import masks
from pallas_kernels import flash_hopper
from pallas_kernels.flash import Extras, Settings

_IDS = jnp.asarray(np.repeat([[0, 1, 2, 3], [5, 5, 1, 0]], [40, 97, 11, 12], axis=1), jnp.int32)
_N = functools.partial(jax.random.normal, jax.random.key(3))


def _documents(q_idx, k_idx, q_info, k_info, dense):
  near = (k_idx <= q_idx) & (k_idx >= q_idx - 50) & (k_idx < 160)
  return near & (q_info[0] == k_info[0])


CALLS = {
  "causal": Call(half(T=200, S=200), masks.causal(), causal(0, 200)),
  "offset, widths, cap, float16": Call(
    half(T=70, S=150, H=96, h=32)._replace(dtype="float16"), masks.causal(80), causal(80, 150),
    logit_cap=5.0,
  ),
  "documents, window, sinks": Call(
    half(B=2, T=160, S=160, H=32, h=64, N=1),
    masks.segments(_IDS) & masks.sliding_window(50),
    _documents,
    Extras(q_info=(_IDS,), k_info=(_IDS,), sinks=_N((1,)) * 2),
  ),
  "dropout": Call(
    half(T=130, S=130, N=1), masks.causal(), causal(0, 130),
    Extras(dropout_seeds=jnp.array([[3]], jnp.int32)), dropout_rate=0.3,
  ),
  "empty rows, large logits": Call(
    half(T=260, S=70, N=1), masks.lengths(query=jnp.array([100], jnp.int32)) & masks.causal(-3),
    amplify=40.0,
  ),
  "widest": Call(half(T=70, S=130, N=1, H=256, h=256), masks.causal(60), causal(60, 130)),
  "wide keys": Call(half(T=70, S=130, N=1, H=192, h=128), masks.causal(60), causal(60, 130)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients(name):
  check(CALLS[name])


_LEAF = st.sampled_from(
  [
    masks.causal(-9),
    masks.sliding_window(3, 11),
    masks.chunked(64),
    masks.strided(5),
    masks.global_tokens(3),
    masks.lengths(key=jnp.array([17], jnp.int32), query=jnp.array([131], jnp.int32)),
  ]
)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(left=_LEAF, right=_LEAF, either=st.booleans(), inverted=st.booleans())
def test_any_mask(left, right, either, inverted):
  """A random composition, read as an array where a block is mixed."""
  mask = left | right if either else left & right
  check(Call(half(T=140, S=130, N=1), ~mask if inverted else mask))


def test_refusals_name_the_values():
  s = Settings(1.0, None, 0.0, causal(0, 1))
  x = lambda width, dtype: jax.ShapeDtypeStruct((1, 8, 1, width), dtype)
  refuse = lambda q, k, v: flash_hopper.unsupported(q, k, v, Extras(), s)
  narrow, wide = x(64, jnp.bfloat16), x(300, jnp.bfloat16)
  assert refuse(narrow, narrow, narrow) is None
  assert refuse(wide, wide, narrow) == "head_dim 300 is more than 256"
  assert refuse(narrow, narrow, wide) == "value head_dim 300 is more than 256"
  assert "float32" in refuse(x(64, jnp.float32), narrow, narrow)
