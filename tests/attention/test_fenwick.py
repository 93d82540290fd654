"""Candidates against blocks that a loop cuts, and the softmax over them."""

import functools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import fenwick
from attention.ops import hardmax

T, RECENT = 150, 16


def blocks(t):
  """(first, end) of the blocks before t's own, from Fenwick's rule: drop the lowest set bit."""
  end = t // RECENT
  while end:
    first = end & (end - 1)
    yield first * RECENT, end * RECENT
    end = first


@functools.cache
def program():
  return jax.jit(functools.partial(fenwick.candidates, recent=RECENT))


@pytest.mark.parametrize("family", ["gaussian", "grid"])
def test_the_own_block_and_a_best_key_of_each_block(family):
  """Queries along the axes and of 0 included; of equal keys any one."""
  q, k = hardmax_kit.planar(family, T)
  index = np.asarray(program()(jnp.asarray(q)[None, :, None], jnp.asarray(k)[None, :, None]))
  score = hardmax_kit.scores(q, k)
  for t in range(T):
    got = sorted(i for i in index[0, t, 0] if i >= 0)
    start = t // RECENT * RECENT
    assert len(set(got)) == len(got) and got[-(t + 1 - start) :] == list(range(start, t + 1))
    before, cuts = got[: -(t + 1 - start)], sorted(blocks(t))
    assert len(before) == len(cuts)
    for s, (first, end) in zip(before, cuts, strict=True):
      assert first <= s < end
      assert score[t, s] >= score[t, first:end].max() - 2e-7 * np.abs(score[t]).max()


def test_a_softmax_over_them_and_the_mass_that_they_hold():
  """Grouped heads; more than the best key alone holds, and all of it while there is one block."""
  q, k, v = kit.Case(B=1, T=T, S=T, N=2, K=1, H=2, h=3).inputs()
  attend = jax.jit(functools.partial(hardmax.fenwick_attention, recent=RECENT, scale=4.0))
  out, index = attend(q, k, v)
  allowed = np.zeros((1, 2, T, T), bool)
  for t, n, c in np.argwhere(np.asarray(index)[0] >= 0):
    allowed[0, n, t, index[0, t, n, c]] = True
  expected, lse = kit.softmax_attention(q, k, v, allowed, scale=4.0)
  kit.assert_close("out", out, expected)
  whole = kit.softmax_attention(q, k, v, np.tri(T, dtype=bool), scale=4.0)[1]
  mass = jax.jit(functools.partial(hardmax.softmax_mass, scale=4.0))(q, k, index)
  kit.assert_close("mass", mass, np.exp(lse - whole))
  one = functools.partial(hardmax.top_k_attention, top_k=1, scale=4.0, is_causal=True)
  _, best = jax.jit(one)(q, k, v)
  assert (np.asarray(mass) >= np.asarray(best) - 1e-6).all()
  assert best.mean() + 0.05 < mass.mean() < 1 and np.allclose(mass[:, :RECENT], 1)


def test_calls_that_are_wrong_or_impossible():
  q, k, v = kit.Case(T=20, S=20, H=2).inputs()
  with pytest.raises(ValueError, match="recent must be a power of two, at least 16, not 24"):
    hardmax.fenwick_attention(q, k, v, recent=24)
  with pytest.raises(NotImplementedError, match="head width is 8, not 2"):
    hardmax.fenwick_attention(*kit.Case().inputs())
