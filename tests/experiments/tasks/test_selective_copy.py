"""Selective copy: the symbols of the context, in order, wherever they stand."""

import numpy as np
import pytest

from experiments.tasks import selective_copy


@pytest.mark.parametrize(("seq_len", "count"), [(4, 1), (16, 4), (64, 16), (200, 16)])
def test_what_is_scored_is_what_is_not_noise(seq_len, count):
  task = selective_copy.make(seq_len=seq_len, seed=0)
  places = []
  for index in range(50):
    record = task.valid[index]
    words = task.decode(record["inputs"].tolist()).split()
    bar = words.index("|")
    assert bar == seq_len - count
    context = [word for word in words[:bar] if word != "."]
    places += [i for i, word in enumerate(words[:bar]) if word != "."]
    scored = record["weights"] == 1.0
    assert np.flatnonzero(scored).tolist() == list(range(bar, seq_len))
    assert task.decode(record["targets"][scored].tolist()).split() == context
    np.testing.assert_array_equal(record["inputs"][1:], record["targets"][:-1])
  assert len(places) == 50 * count
  assert min(places) < 0.25 * seq_len
  assert max(places) > 0.5 * (seq_len - count)


def test_bad_sizes():
  with pytest.raises(ValueError, match="selective_copy must be at least 4, got 3"):
    selective_copy.make(seq_len=3, seed=0)
  with pytest.raises(ValueError, match="with count=16 must be at least 32, got 31"):
    selective_copy.make(seq_len=31, seed=0, count=16)
  with pytest.raises(ValueError, match="count must be at least 1, got 0"):
    selective_copy.make(seq_len=31, seed=0, count=0)
