"""cuDNN's part in the choice: which calls it is handed, as what, and why not the others."""

import jax
import jax.numpy as jnp
import pytest

import kit
from attention import causal, cudnn, explain, lengths, make_dropout, segments, sliding_window
from attention import dot_product_attention as attend

AMPERE = ("NVIDIA A100-SXM4-80GB", "cuda")
Q = jax.ShapeDtypeStruct((2, 4096, 8, 64), jnp.bfloat16)
KV = jax.ShapeDtypeStruct((2, 4096, 2, 64), jnp.bfloat16)
IDS = jnp.zeros((2, 4096), jnp.int32)
ROWS = jnp.array([7, 9], jnp.int32)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"is_causal": True},
    {"mask": causal() & sliding_window(255)},
    {"is_causal": True, "local_window_size": (100, 0)},
    {"key_value_seq_lengths": ROWS, "is_causal": True},
  ],
)
def test_it_runs_what_it_has_words_for(options):
  with kit.pretend(*AMPERE):
    assert explain(attend, Q, KV, KV, **options).startswith("dot_product_attention runs 'cudnn'")


@pytest.mark.parametrize(
  ("options", "reason"),
  [
    ({"mask": segments(IDS)}, "its mask would be a T x S array"),
    ({"mask": causal(3)}, "its mask would be a T x S array"),
    ({"mask": ~causal()}, "its mask would be a T x S array"),
    ({"mask": sliding_window(9, 9)}, "its mask would be a T x S array"),
    ({"return_residual": True}, "the gradient of its log-sum-exp is dropped"),
    ({"logit_cap": 30.0, "sinks": jnp.zeros(8)}, "it is not given sinks and a logit cap"),
    ({"dropout": make_dropout(0.1, jax.random.key(0), 2, 8)}, "it is not given dropout"),
  ],
)
def test_it_refuses_what_it_would_get_wrong_or_make_large(options, reason):
  with kit.pretend(*AMPERE):
    text = explain(attend, Q, KV, KV, **options)
  assert text.startswith("dot_product_attention runs 'tiled'") and f"not 'cudnn': {reason}" in text


def test_it_refuses_widths_and_dtypes():
  with kit.pretend(*AMPERE):
    for shape, dtype, reason in (
      ((2, 4096, 8, 256), jnp.bfloat16, "not H=256, h=256"),
      ((2, 4096, 8, 64), jnp.float32, "not float32"),
    ):
      x = jax.ShapeDtypeStruct(shape, dtype)
      assert reason in explain(attend, x, x, x)


def test_it_refuses_gpus_whose_attention_it_has_not():
  with kit.pretend("NVIDIA GeForce RTX 2080 Ti", "cuda"):
    text = explain(attend, Q, KV, KV, is_causal=True)
  assert text.startswith("dot_product_attention runs 'tiled'")
  assert "not 'cudnn': it needs an NVIDIA GPU, Ampere or newer, and this is NVIDIA Ge" in text


def test_masks_become_the_arguments_that_mean_the_same():
  """jax.nn with these arguments, dense, is our mask: the window looks at no future."""
  make = lambda *shape: kit.normal(jax.random.key(0), *shape)
  q, k, v = make(2, 12, 4, 8), make(2, 12, 2, 8), make(2, 12, 2, 8)
  for mask in (causal(), sliding_window(3), causal() & lengths(ROWS, ROWS), lengths(key=ROWS)):
    known = cudnn._known(mask)
    assert known is not None
    # A query without keys is a uniform mean in jax.nn and 0 here: leave padding out.
    rows = slice(0, 7)
    want = jax.nn.dot_product_attention(q, k, v, **known)[:, rows]
    assert jnp.allclose(attend(q, k, v, mask=mask)[:, rows], want, atol=1e-5)
