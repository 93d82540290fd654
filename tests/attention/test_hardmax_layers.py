"""The k best keys of planar heads against sorted rows of scores."""

import functools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import hardmax_layers

T, TOP_K = 150, 5


@functools.cache
def program(causal, top_k=TOP_K):
  """Of one head, blocks of 32 on the diagonal, so that there are levels above."""

  def run(q, k):
    q, k = (x[None, :, None] for x in (q, k))
    return hardmax_layers.retrieve(q, k, top_k=top_k, causal=causal, diagonal=32)[0, :, 0]

  return jax.jit(run)


def lost(q, k, causal, top_k=TOP_K):
  """By how much the scores of the keys that were found miss the best ones, `T top_k`, best first.
  All found keys are different, seen, and as many as there are.
  """
  index = np.asarray(program(causal, top_k)(jnp.asarray(q), jnp.asarray(k)))
  score = hardmax_kit.scores(q, k)
  if causal:
    score = np.where(np.tri(*score.shape, dtype=bool), score, -np.inf)
  wanted = -np.sort(-score, axis=1)[:, :top_k]
  for t, row in enumerate(index):
    real = row[row >= 0]
    assert len(set(real)) == len(real) == min(top_k, t + 1 if causal else len(k))
    assert not causal or (real <= t).all()
  got = np.take_along_axis(score, np.maximum(index, 0), 1)
  there = wanted > -np.inf
  return np.where(there, wanted, 0) - np.where(there, got, 0)


@pytest.mark.parametrize("family", hardmax_kit.FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_best_scores(family, causal):
  """Axis queries, as short as they may be, and 0 included. Integers lose nothing, however many keys
  are tied.
  """
  q, k = hardmax_kit.planar(family, T)
  q[5::31] = -(2.0**-100), 0
  missed = lost(q, k, causal)
  exact = family not in ("gaussian", "circle")
  assert missed.max() <= (0 if exact else 2e-7 * np.abs(q).max() * np.abs(k).max())


POINT = st.tuples(*[st.integers(-3, 3)] * 2)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_streams_of_few_different_points(data):
  """Drawn points, repeated in any order: duplicates, lines, and layers that take many of both."""
  points = np.array(data.draw(st.lists(POINT, min_size=1, max_size=12)), np.float32)
  slopes = np.array(data.draw(st.lists(POINT, min_size=1, max_size=6)), np.float32)
  rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
  k, q = (x[rng.integers(0, len(x), T)] for x in (points, slopes))
  assert lost(q, k, causal=True).max() == 0


def test_as_many_as_there_are():
  """All 20 keys, of a square of 32: every layer is asked for until nothing is left."""
  for family in ("parabola", "grid"):
    q, k = hardmax_kit.planar(family, 20)
    assert lost(q, k, causal=False, top_k=24).max() == 0
