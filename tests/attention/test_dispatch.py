"""Choosing an implementation: the first that can, a named one or an error, and every reason
said.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import (
  dispatch,
  dot_product_attention,
  explain,
  from_function,
  hardmax_attention,
  linear_attention,
  linear_scan,
  segments,
  softmax_mass,
)
from attention.dispatch import Implementation

IDS = np.repeat([[0, 1], [2, 3]], [13, 20], axis=1).astype(np.int32)
TABLE = {
  "fast": Implementation(lambda call: "fast", lambda call: "it is odd" if call % 2 else None),
  "slow": Implementation(lambda call: "slow", lambda call: "it is 7" if call == 7 else None),
}


def test_first_without_objection():
  assert dispatch.choose(None, TABLE, 4) == "fast"
  assert dispatch.choose(None, TABLE, 5) == "slow"


def test_none_left_says_every_reason():
  with pytest.raises(NotImplementedError, match="fast: it is odd; slow: it is 7"):
    dispatch.choose(None, TABLE, 7)


def test_a_named_one_never_falls_back():
  with pytest.raises(NotImplementedError, match="'fast' cannot run this call: it is odd"):
    dispatch.choose("fast", TABLE, 5)


def test_misspelt():
  with pytest.raises(ValueError, match="'fats' is unknown; did you mean 'fast'"):
    dispatch.choose("fats", TABLE, 4)
  with pytest.raises(ValueError, match="choose from fast, slow"):
    dispatch.choose("qqq", TABLE, 4)


def test_explain_says_what_runs_and_why_not_the_rest():
  small, large = (jax.ShapeDtypeStruct((1, T, 4, 8), jnp.float32) for T in (64, 2**20))
  text = explain(dot_product_attention, small, small, small, is_causal=True)
  assert text.startswith("dot_product_attention runs 'xla'")
  text = explain(dot_product_attention, large, large, large, is_causal=True)
  assert text.startswith("dot_product_attention runs 'tiled'")
  assert (
    "not 'xla': its T x S = 1048576 x 1048576 scores are more than the 512 x 512 of a tile" in text
  )
  assert "not 'reference'" in text
  text = explain(dot_product_attention, small, small, small, implementation="tiled")
  assert text.startswith("dot_product_attention runs 'tiled', as named")


def test_explain_raises_what_the_call_would():
  x, y = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 4, 2, 9))
  with pytest.raises(ValueError, match="head width"):
    explain(dot_product_attention, x, y, y)


@pytest.mark.parametrize(
  "attend",
  [
    functools.partial(dot_product_attention, is_causal=True, implementation="tiled"),
    functools.partial(dot_product_attention, mask=segments(IDS), implementation="tiled"),
    linear_attention,
    hardmax_attention,
    lambda q, k, v: linear_scan(v[:, :, 0], -(k[:, :, 0] ** 2)),
    lambda q, k, v: softmax_mass(q, k, jnp.zeros((*q.shape[:3], 1), int)) * v[..., 0],
  ],
  ids=["tiled", "numpy", "linear", "hardmax", "linear_scan", "softmax_mass"],
)
def test_outside_of_jit_a_call_like_one_before_compiles_nothing(attend, caplog):
  """Loops had been compiled anew by every call: half a second of each."""
  q, k, v = kit.Case(K=4).inputs()
  gradient = jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2))
  first = attend(q, k, v), gradient(q, k, v)
  q, k, v = (x * 1.5 for x in (q, k, v))
  with jax.log_compiles():
    second = attend(q, k, v), gradient(q, k, v)
  assert not [text for text in caplog.messages if text.startswith("Compiling")]
  assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["as it is", "jit"])
def test_a_mask_of_numpy_arrays_is_that_of_jax_arrays(jit):
  q, k, v = kit.Case().inputs()
  run = jit(functools.partial(dot_product_attention, implementation="tiled"))
  odd = from_function(lambda q, k: (q + k) % 3 != 0)
  for mask in (segments, lambda ids: segments(ids) & odd):
    out, want = (run(q, k, v, mask=mask(ids)) for ids in (IDS, jnp.asarray(IDS)))
    kit.assert_same("out", out, want)


def test_what_a_function_of_the_caller_reads_may_change():
  q, k, v = kit.Case().inputs()
  weight, width = [1.0], [3]
  phi = lambda x: jax.nn.relu(x) * weight[0]
  window = from_function(lambda q, k: abs(q - k) < width[0])
  before = linear_attention(q, k, v, feature_map=phi), dot_product_attention(q, k, v, mask=window)
  weight[0], width[0] = 2.0, 5
  after = linear_attention(q, k, v, feature_map=phi), dot_product_attention(q, k, v, mask=window)
  kit.assert_close("a feature map", after[0], before[0] * 4)
  fresh = from_function(lambda q, k: abs(q - k) < 5)
  kit.assert_same("a mask", after[1], dot_product_attention(q, k, v, mask=fresh))
  assert np.any(np.asarray(before[1]) != np.asarray(after[1]))
