"""Copy: the answers are determined by the inputs, and lie at no fixed distance."""

import numpy as np
import pytest

from experiments.tasks import copy


@pytest.mark.parametrize("seq_len", [2, 3, 10, 33])
def test_what_is_scored_is_what_came_before_the_bar(seq_len):
  task = copy.make(seq_len=seq_len, seed=0)
  for index in range(50):
    record = task.valid[index]
    words = task.decode(record["inputs"].tolist()).split()
    count = words.index("|")
    assert (seq_len // 2 + 1) // 2 <= count <= seq_len // 2
    scored = record["weights"] == 1.0
    assert np.flatnonzero(scored).tolist() == list(range(count, 2 * count))
    assert task.decode(record["targets"][scored].tolist()).split() == words[:count]
    np.testing.assert_array_equal(record["inputs"][1:], record["targets"][:-1])


def test_all_lengths_and_symbols_occur():
  task = copy.make(seq_len=12, seed=0, symbols=5)
  records = [task.train[i] for i in range(300)]
  assert {int(record["weights"].sum()) for record in records} == {3, 4, 5, 6}
  answers = np.concatenate([record["targets"][record["weights"] > 0] for record in records])
  assert np.bincount(answers, minlength=5) / answers.size == pytest.approx([0.2] * 5, abs=0.04)
  assert task.vocab_size == 7


def test_a_picture():
  task = copy.make(seq_len=9, seed=0, symbols=4)
  words = task.decode(task.valid[0]["inputs"].tolist()).split()
  assert set(words) <= {"a", "b", "c", "d", "|", "."}


def test_bad_sizes():
  with pytest.raises(ValueError, match="seq_len for the task copy must be at least 2, got 1"):
    copy.make(seq_len=1, seed=0)
  with pytest.raises(ValueError, match="copy:symbols must be at least 2, got 1"):
    copy.make(seq_len=8, seed=0, symbols=1)
