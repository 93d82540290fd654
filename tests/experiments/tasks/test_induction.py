"""Induction: exactly two marks, and the answer after the first."""

import numpy as np
import pytest

from experiments.tasks import induction


@pytest.mark.parametrize("seq_len", [3, 4, 32])
def test_the_answer_followed_the_first_mark(seq_len):
  task = induction.make(seq_len=seq_len, seed=0)
  places = []
  for index in range(300):
    record = task.valid[index]
    words = task.decode(record["inputs"].tolist()).split()
    assert words.count("*") == 2
    assert words[-1] == "*"
    first = words.index("*")
    places.append(first)
    assert np.flatnonzero(record["weights"]).tolist() == [seq_len - 1]
    assert task.decode([record["targets"][-1]]) == words[first + 1] != "*"
  assert set(places) == set(range(seq_len - 2))


def test_bad_sizes():
  with pytest.raises(ValueError, match="task induction must be at least 3, got 2"):
    induction.make(seq_len=2, seed=0)
