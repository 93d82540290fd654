"""Choosing an implementation: the first that can, a named one or an error, and every reason
said.
"""

import jax
import jax.numpy as jnp
import pytest

from attention import dispatch, dot_product_attention, explain
from attention.dispatch import Implementation

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
