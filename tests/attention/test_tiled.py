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


def _cut(q, k, block, **how):
  """Blocks of that side, everything side by side where `how` does not say otherwise."""
  sides = [min(block, -(-x.shape[1] // 8) * 8) for x in (q, k)]
  return tiled.Tiling(*sides, **{"rows": q.shape[0], "heads": k.shape[2], **how})


@functools.partial(jax.jit, static_argnames="cut")
def _attend(q, k, v, mask, cut, modifiers=_PLAIN, sinks=None):
  return tiled.attend(
    q, k, v, mask, modifiers, sinks, scale=q.shape[-1] ** -0.5, logit_cap=None, tiling=cut
  )


@functools.partial(jax.jit, static_argnames="cut")
def _gradients(q, k, v, mask, cut):
  def loss(q, k, v):
    out, lse = _attend(q, k, v, mask, cut)
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
@given(
  left=_LEAF,
  right=_LEAF,
  either=st.booleans(),
  inverted=st.booleans(),
  how=st.sampled_from([{}, {"rows": 1, "heads": 1, "quarters": True}]),
)
def test_any_mask_forward_and_backward(left, right, either, inverted, how):
  """A random composition, all at once or head by head and mixed blocks in quarters, against the
  reference: output, log-sum-exp, every gradient.
  """
  mask = left | right if either else left & right
  mask = ~mask if inverted else mask
  q, k, v = kit.Case(T=_LENGTH, S=_LENGTH).inputs()
  got = _results(lambda q, k, v: _attend(q, k, v, mask, _cut(q, k, 16, **how)), q, k, v)
  kit.assert_trees_close(got, _reference(q, k, v, mask.as_array(_LENGTH, _LENGTH)))


def _results(attend, q, k, v):
  """Output, log-sum-exp and every gradient, by name."""

  def loss(q, k, v):
    out, lse = attend(q, k, v)
    total = (out * jnp.cos(out)).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()
    return total, {"out": out, "lse": lse}

  gradients, aux = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return aux, dict(zip(("dq", "dk", "dv"), gradients, strict=True))


@jax.jit
def _reference(q, k, v, mask):
  def attend(q, k, v):
    out, lse = dot_product_attention(
      q, k, v, mask=mask, implementation="reference", return_residual=True
    )
    return out, lse.swapaxes(1, 2)

  return _results(attend, q, k, v)


@pytest.mark.parametrize("block", [8, 16, 40, 512])
def test_block_size_changes_only_the_last_bits(block):
  q, k, v = kit.Case(T=61, S=61).inputs()
  mask = masks.causal()
  cuts = [_cut(q, k, b) for b in (block, 24)]
  actual, expected = (_attend(q, k, v, mask, cut)[0] for cut in cuts)
  kit.assert_close("out", actual, expected)
  actual, expected = (_gradients(q, k, v, mask, cut) for cut in cuts)
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
  cut = _cut(q, k, 32)
  out, lse = _attend(q, *bad, mask, cut)
  assert np.isfinite(out).all()
  dq, dk, dv = _gradients(q, *bad, mask, cut)
  assert np.isfinite(dq).all() and np.isfinite(dk[:, :96]).all() and np.isfinite(dv[:, :96]).all()
  kit.assert_close("dk of unseen keys", dk[:, 96:], np.zeros_like(dk[:, 96:]))


def test_visits_are_those_of_the_window():
  cut = tiled.Tiling(64, 64)
  window = masks.causal() & masks.sliding_window(63)
  by_query, by_key = tiled.schedule(window, 1024, 1024, cut)
  np.testing.assert_array_equal(by_query.active, [1] + [2] * 15)
  np.testing.assert_array_equal(by_key.active, [2] * 15 + [1])
  by_query, _ = tiled.schedule(masks.causal(), 1024, 1024, cut)
  np.testing.assert_array_equal(by_query.active, np.arange(1, 17))
  np.testing.assert_array_equal(by_query.full, np.arange(16))


@pytest.mark.parametrize(
  ("mask", "per_block"),
  [(masks.causal(), 3), (masks.sliding_window(64), 6), (masks.strided(5), 4 * 4)],
  ids=["causal", "window", "strided"],
)
def test_quarters_are_what_mixed_blocks_hold(mask, per_block):
  """Full blocks and quarters cover every allowed pair once; of a causal mask three a row."""
  T, cut = 256, tiled.Tiling(64, 64)
  by_query, _ = tiled.schedule(mask, T, T, cut)
  fine = tiled.quarters(mask, T, T, cut)
  visits = np.zeros((T, T), int)
  for i in range(4):
    for j in by_query.order[i, : by_query.full[i]]:
      visits[i * 64 :, j * 64 :][:64, :64] += 1
    for a, b in (divmod(n, 8) for n in fine.order[i, : fine.active[i]]):
      visits[i * 64 + a * 32 :, b * 32 :][:32, :32] += 1
  assert visits.max() == 1
  assert not (np.asarray(mask.as_array(T, T))[0, 0] & (visits == 0)).any()
  assert fine.active[-1] == per_block and not fine.full.any()


def _tiling(mask, B, N, K, T, cache=tiled.SHARED):
  return tiled.choose(mask, (B, T, N, 64), (B, T, K, 64), cache)


def test_small_windows_get_small_tiles():
  T = 2**14
  assert _tiling(masks.sliding_window(64), 1, 8, 8, T)[:2] == (128, 128)
  assert _tiling(masks.causal(), 1, 8, 8, T)[:2] == (256, 256)
  assert _tiling(masks.causal(), 1, 2, 2, T)[:2] == (512, 512)


def test_a_core_takes_a_head_at_a_time():
  """On each of the 8 devices of these tests, where a mesh of them is in context."""
  causal, core = masks.causal(), tiled.OF_A_CORE
  assert _tiling(causal, 3, 9, 9, 2**12, core) == (256, 256, True, 1, 1)
  assert _tiling(causal, 3, 36, 9, 2**12, core) == (128, 128, False, 1, 1)
  assert _tiling(causal, 3, 9, 9, 32, core) == (32, 32, False, 3, 9)
  with jax.set_mesh(jax.make_mesh((2, 4), ("rows", "heads"))):
    assert _tiling(causal, 1, 8, 8, 2**12, core)[-2:] == (1, 8)
    assert _tiling(causal, 1, 16, 16, 2**12, core)[-2:] == (1, 8)
    assert _tiling(causal, 16, 16, 16, 2**12, core)[-2:] == (8, 8)


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


@pytest.mark.parametrize(
  "how", [{"rows": 1}, {"heads": 1}, {"rows": 1, "heads": 1, "quarters": True}]
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_part_by_part_equals_all_at_once(how, shape):
  """Rows of the batch or heads one after the other; a bias that they share and one of each."""
  kit.assert_trees_close(_in_parts(shape, **how), _in_parts(shape))


@functools.cache
def _in_parts(shape, **how):
  """Every result of a call by name, with a bias of that shape, cut up as `how` says."""
  q, k, v = kit.Case(B=3, T=40, S=40).inputs()
  make = kit.keys(7)
  bias = kit.normal(next(make), *shape, 40, 40)
  slopes, sinks = jnp.array([0.1, 0.2, 0.3, 0.4]), kit.normal(next(make), 4)
  names = ("dq", "dk", "dv", "dbias", "dslopes", "dsinks", "out", "lse")

  def loss(q, k, v, bias, slopes, sinks):
    cut = _cut(q, k, 16, **how)
    out, lse = _attend(q, k, v, masks.causal(), cut, Modifiers(bias, slopes), sinks)
    return jnp.sin(out).sum() + lse.sum(), (out, lse)

  gradients = jax.jit(jax.grad(loss, argnums=tuple(range(6)), has_aux=True))
  values, aux = gradients(q, k, v, bias, slopes, sinks)
  return dict(zip(names, (*values, *aux), strict=True))


@pytest.mark.parametrize("axis", ["data", "heads"])
@pytest.mark.parametrize("cache", [tiled.SHARED, tiled.OF_A_CORE], ids=["shared", "of a core"])
def test_what_a_mesh_cuts_stays_where_it_is(axis, cache):
  """Rows or heads of a jitted call are cut by 8: no device asks another for what it holds."""
  q, k, v = kit.Case(B=16, T=520, S=520, N=16, K=16, H=8, h=8).inputs()
  mesh = jax.make_mesh((8,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.P("data") if axis == "data" else jax.P(None, None, "heads")
  x = jax.device_put((q, k, v), jax.NamedSharding(mesh, spec))
  cut = _tiling(masks.causal(), 16, 16, 16, 520, cache)
  assert cut.rows < 16, "or nothing is shown"
  compiled = _gradients.lower(*x, masks.causal(), cut=cut).compile()
  assert "all-gather" not in compiled.as_text()
  assert "all-to-all" not in compiled.as_text()
  for gradient in compiled.output_shardings:
    assert gradient.shard_shape(q.shape) == x[0].sharding.shard_shape(q.shape)
