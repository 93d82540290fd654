"""The tiled implementation: what it visits, what it never holds, and that the cut into tiles
changes only the last bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kit
from attention import dot_product_attention, masks, tiled
from attention.scores import Modifiers

_PLAIN = Modifiers()


@functools.partial(jax.jit, static_argnames="block")
def _attend(q, k, v, mask, block, modifiers=_PLAIN, sinks=None):
  return tiled.attend(
    q, k, v, mask, modifiers, sinks, scale=q.shape[-1] ** -0.5, logit_cap=None, block=block
  )


@functools.partial(jax.jit, static_argnames="block")
def _gradients(q, k, v, mask, block):
  def loss(q, k, v):
    out, lse = _attend(q, k, v, mask, block)
    return (out * jnp.cos(out)).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

  return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


_LENGTH = 50
_IDS = jnp.array([[0] * 20 + [1] * 30, [0] * 13 + [4] * 37], jnp.int32)
_LEAF = st.sampled_from(
  [
    masks.causal(),
    masks.causal(-9),
    masks.sliding_window(7),
    masks.sliding_window(3, 11),
    masks.chunked(16),
    masks.strided(5),
    masks.global_tokens(3),
    masks.prefix(21),
    masks.segments(_IDS),
    masks.lengths(key=jnp.array([50, 17], jnp.int32), query=jnp.array([31, 50], jnp.int32)),
    masks.from_function(lambda q, k: (q * 3 + k) % 4 != 0),
  ]
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(left=_LEAF, right=_LEAF, either=st.booleans(), inverted=st.booleans())
def test_any_mask_forward_and_backward(left, right, either, inverted):
  """A random composition, against the reference: output, log-sum-exp, every gradient."""
  mask = left | right if either else left & right
  mask = ~mask if inverted else mask
  q, k, v = kit.Case(T=_LENGTH, S=_LENGTH).inputs()

  def loss(implementation, q, k, v):
    if implementation == "tiled":
      out, lse = _attend(q, k, v, mask, 16)
      lse = lse.swapaxes(1, 2)
    else:
      out, lse = dot_product_attention(
        q, k, v, mask=mask, implementation="reference", return_residual=True
      )
    total = (out * jnp.cos(out)).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()
    return total, {"out": out, "lse": lse}

  def run(implementation):
    f = jax.value_and_grad(lambda *x: loss(implementation, *x), argnums=(0, 1, 2), has_aux=True)
    (_, aux), gradients = jax.jit(f)(q, k, v)
    return aux, dict(zip(("dq", "dk", "dv"), gradients, strict=True))

  kit.assert_trees_close(run("tiled"), run("reference"))


@pytest.mark.parametrize("block", [8, 16, 40, 512])
def test_block_size_changes_only_the_last_bits(block):
  q, k, v = kit.Case(T=61, S=61).inputs()
  mask = masks.causal()
  kit.assert_close("out", _attend(q, k, v, mask, block)[0], _attend(q, k, v, mask, 24)[0])
  actual, expected = (_gradients(q, k, v, mask, b) for b in (block, 24))
  kit.assert_trees_close(actual, expected)


@pytest.mark.parametrize(
  "mask",
  [masks.sliding_window(20), masks.segments(jnp.arange(128, dtype=jnp.int32)[None] // 32)],
  ids=["window", "segments"],
)
def test_empty_blocks_are_never_read(mask):
  """Keys and values that no query may see are NaN: one look at their blocks would spoil output or
  gradients.
  """
  q, k, v = kit.Case(B=1, T=128, S=128).inputs()
  mask = mask & masks.prefix(96)
  bad = [x.at[:, 96:].set(jnp.nan) for x in (k, v)]
  out, lse = _attend(q, *bad, mask, 32)
  assert np.isfinite(out).all()
  dq, dk, dv = _gradients(q, *bad, mask, 32)
  assert np.isfinite(dq).all() and np.isfinite(dk[:, :96]).all() and np.isfinite(dv[:, :96]).all()
  kit.assert_close("dk of unseen keys", dk[:, 96:], np.zeros_like(dk[:, 96:]))


def test_visits_are_those_of_the_window():
  settings = tiled.Settings(1.0, None, 64, 64)
  by_query, by_key = tiled.schedule(masks.causal() & masks.sliding_window(63), 1024, 1024, settings)
  np.testing.assert_array_equal(by_query.active, [1] + [2] * 15)
  np.testing.assert_array_equal(by_key.active, [2] * 15 + [1])
  by_query, _ = tiled.schedule(masks.causal(), 1024, 1024, settings)
  np.testing.assert_array_equal(by_query.active, np.arange(1, 17))
  np.testing.assert_array_equal(by_query.full, np.arange(16))


def test_small_windows_get_small_tiles():
  assert tiled.block_size(masks.sliding_window(64), 8, 2**14, 2**14) == 128
  assert tiled.block_size(masks.causal(), 8, 2**14, 2**14) == 256
  assert tiled.block_size(masks.causal(), 2, 2**14, 2**14) == 512


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_as_the_length(backward):
  """Compiled temporaries beyond inputs and outputs: four times the length, four times the memory
  and no more.
  """

  def loss(q, k, v):
    return dot_product_attention(q, k, v, is_causal=True, implementation="tiled").sum()

  def temporary(T):
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    f = jax.grad(loss, argnums=(0, 1, 2)) if backward else loss
    return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

  small, large = temporary(2**12), temporary(2**14)
  assert large <= 4.2 * small
  assert large < 2**14 * 2**14  # less than a byte for every pair


def test_rows_one_by_one_equal_rows_together(monkeypatch):
  """With and without the loop over the batch that keeps tiles in the cache; a bias shared and one
  of each row.
  """
  q, k, v = kit.Case(B=3, T=40, S=40).inputs()
  make = kit.keys(7)
  for bias_rows in (1, 3):
    bias = kit.normal(next(make), bias_rows, 4, 40, 40)
    slopes = jnp.array([0.1, 0.2, 0.3, 0.4])

    def gradients(q, k, v, bias, slopes):
      loss = lambda *x: jnp.sin(_attend(*x[:3], masks.causal(), 16, Modifiers(*x[3:]))[0]).sum()
      return jax.grad(loss, argnums=tuple(range(5)))(q, k, v, bias, slopes)

    together = jax.jit(gradients)(q, k, v, bias, slopes)
    with monkeypatch.context() as patch:
      patch.setattr(tiled, "_TILE_ELEMENTS", 1)
      jax.clear_caches()  # the constant is read while tracing
      one_by_one = jax.jit(gradients)(q, k, v, bias, slopes)
    kit.assert_trees_close(one_by_one, together)
