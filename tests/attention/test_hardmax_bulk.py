"""The divide and conquer against a scan of all keys."""

import functools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import hardmax_bulk

T = 200
EXACT = ("parabola", "grid", "collinear")


@functools.cache
def program(causal):
  """Output, winners and the gradient of the values, of one head, blocks of 32 on the diagonal."""

  def run(q, k, v, g):
    def loss(v):
      out, winners = hardmax_bulk.attend(
        *(x[None, :, None] for x in (q, k, v)), ties="average", causal=causal, diagonal=32
      )
      return (out[0, :, 0] * g).sum(), (out[0, :, 0], jax.tree.map(lambda x: x[0, :, 0], winners))

    (_, aux), dv = jax.value_and_grad(loss, has_aux=True)(v)
    return *aux, dv

  return jax.jit(run)


def answer(family, causal, seed):
  q, k = hardmax_kit.planar(family, T, seed)
  rng = np.random.default_rng(seed)
  v, g = rng.normal(size=(2, T, 3)).astype(np.float32)
  out, winners, dv = program(causal)(*(jnp.asarray(x) for x in (q, k, v, g)))
  return q, k, v, g, out, jax.tree.map(np.asarray, winners), dv


@pytest.mark.parametrize("family", hardmax_kit.FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_mean_of_all_ties(family, causal):
  """Of five kinds of keys, three times: the winners, their number, their mean and its gradient."""
  for seed in range(3):
    q, k, v, g, out, winners, dv = answer(family, causal, seed)
    expected = hardmax_kit.scan(q, k, causal)
    assert hardmax_kit.relative_regret(q, k, winners.best, causal) <= 2e-7
    if family in EXACT:
      assert hardmax_kit.relative_regret(q, k, winners.best, causal) == 0
    np.testing.assert_array_equal(winners.count, expected.count)
    np.testing.assert_array_equal(winners.last, expected.last)
    kit.assert_close("out", out, expected.average(v))
    kit.assert_close("dv", dv, expected.average_gradient(g))


def test_duplicates_of_any_floats_tie():
  """Few different keys, no integers: equal keys have equal scores wherever they are met."""
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, T, 2)).astype(np.float32)
  k = k[rng.integers(0, 9, T)]
  v, g = rng.normal(size=(2, T, 3)).astype(np.float32)
  _, winners, _ = program(True)(*(jnp.asarray(x) for x in (q, k, v, g)))
  expected = hardmax_kit.scan(q, k)
  assert expected.count.max() > 10
  np.testing.assert_array_equal(winners.count, expected.count)
  np.testing.assert_array_equal(winners.last, expected.last)


def test_sums_of_ties_are_not_differences_of_great_ones():
  """One value of 1e8 beside others of about 1: means without it keep their digits."""
  q, k = hardmax_kit.planar("grid", T)
  v = np.random.default_rng(0).normal(size=(T, 3)).astype(np.float32)
  v[3] = 1e8
  out, _, _ = program(True)(*(jnp.asarray(x) for x in (q, k, v, v)))
  expected = hardmax_kit.scan(q, k)
  without = ~expected.tied[:, 3]
  kit.assert_close("out", np.asarray(out)[without], expected.average(v)[without])


def test_the_latest_of_all_ties_and_heads_that_share_keys():
  """Two query heads of one key head, and rows of a batch: values and gradients of each alone."""
  q = np.stack([hardmax_kit.planar(f, T)[0] for f in ("gaussian", "grid", "grid", "collinear")])
  q = q.reshape(2, 2, T, 2).swapaxes(1, 2)
  k = np.stack([hardmax_kit.planar(f, T)[1] for f in ("gaussian", "collinear")])[:, :, None]
  rng = np.random.default_rng(0)
  v, g = (rng.normal(size=(2, T, heads, 3)).astype(np.float32) for heads in (1, 2))
  attend = functools.partial(hardmax_bulk.attend, ties="latest", causal=True, diagonal=32)

  @jax.jit
  def run(q, k, v, g):
    out, back, winners = jax.vjp(lambda v: attend(q, k, v), v, has_aux=True)
    return out, winners, back(g)[0]

  out, winners, dv = run(*(jnp.asarray(x) for x in (q, k, v, g)))
  expected = np.zeros_like(v)
  for b, n in np.ndindex(2, 2):
    last = hardmax_kit.scan(q[b, :, n], k[b, :, 0]).last
    np.testing.assert_array_equal(winners.last[b, :, n], last)
    np.testing.assert_array_equal(out[b, :, n], v[b, last, 0])
    expected[b, :, 0] += np.eye(T, dtype=np.float32)[last].T @ g[b, :, n]
  kit.assert_close("dv", dv, expected)


def test_nothing_later_is_read_for_a_nan():
  """In blocks and above: outputs do not know the values that come later, nor gradients later keys;
  what is read of nobody is 0.
  """
  q, k = hardmax_kit.planar("gaussian", T)
  v, g = np.random.default_rng(0).normal(size=(2, T, 3)).astype(np.float32)
  g[150:] = 0
  for bad in (slice(0, 1), slice(40, 90, 7), slice(0, 40), slice(0, T)):
    nan = k.copy()
    nan[bad, 1] = np.nan
    later = np.where(np.arange(T)[:, None] < 150, v, 1e6).astype(np.float32)
    one, other = (program(True)(*map(jnp.asarray, (q, nan, x, g))) for x in (v, later))
    kit.assert_same("out", one[0][:150], other[0][:150])
    assert (one[1].last <= np.arange(T)).all()
    assert not np.asarray(one[0])[np.asarray(one[1].count) == 0].any()
    assert not np.asarray(one[2])[150:].any() and np.isfinite(one[2]).all()


def test_heads_side_by_side_on_a_mesh():
  """Of one part one head has ties, one queries along x, and two have neither: each gets
  what it gets alone, the gradient but for the order of sums.
  """
  make = kit.keys()
  q, k = (np.array(kit.normal(next(make), 1, T, 4, 2)) for _ in range(2))
  q[:, ::3, 0, 1] = 0
  q[..., 1, :], k[..., 1, :] = hardmax_kit.planar("grid", T)
  v, g = (kit.normal(next(make), 1, T, 4, 3) for _ in range(2))

  @jax.jit
  def run(q, k, v):
    attend = functools.partial(hardmax_bulk.attend, ties="average", causal=True, diagonal=32)
    out, pull, winners = jax.vjp(lambda v: attend(q, k, v), v, has_aux=True)
    return (out, winners), pull(g)[0]

  alone = run(q, k, v)
  assert (alone[0][1].count > 1).any(axis=(0, 1)).tolist() == [False, True, False, False]
  with jax.set_mesh(jax.make_mesh((4,), ("heads",), devices=jax.devices()[:4])):
    together = run(q, k, v)
  jax.tree.map(np.testing.assert_array_equal, together[0], alone[0])
  kit.assert_close("dv", together[1], alone[1])
