"""MQAR as zoology draws it: pairs, questions, gaps, filler."""

import numpy as np
import pytest

from experiments.tasks import recall


@pytest.mark.parametrize(
  ("seq_len", "pairs", "vocab_size"), [(64, 4, 8192), (64, 16, 8192), (8, 2, 6), (256, 64, 131)]
)
@pytest.mark.parametrize("filler", [True, False])
def test_records_follow_the_specification(seq_len, pairs, vocab_size, filler):
  task = recall.make(
    seq_len=seq_len, seed=0, pairs=pairs, vocab_size=vocab_size, random_non_queries=filler
  )
  half = vocab_size // 2
  for index in range(30):
    record = task.train[index]
    inputs, targets = record["inputs"], record["targets"]
    keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
    assert len(set(keys.tolist())) == len(set(values.tolist())) == pairs
    assert keys.min() >= 1 and keys.max() < half <= values.min() and values.max() < vocab_size
    asked = np.flatnonzero(record["weights"])
    assert len(asked) == pairs
    assert asked.min() >= 2 * pairs and not np.any(asked % 2)
    # Each key is asked once, and the pairs alone tell the answer.
    assert sorted(inputs[asked].tolist()) == sorted(keys.tolist())
    answer = dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert targets[asked].tolist() == [answer[key] for key in inputs[asked].tolist()]
    assert not targets[record["weights"] == 0].any()
    if not filler:
      rest = np.setdiff1d(np.arange(2 * pairs, seq_len), asked)
      assert not inputs[rest].any()


def gaps(power_a, count):
  task = recall.make(seq_len=16, seed=0, pairs=2, vocab_size=32, power_a=power_a)
  for index in range(count):
    record = task.train[index]
    order = [
      int(np.flatnonzero(record["weights"] * (record["inputs"] == key))[0])
      for key in record["inputs"][:4:2]
    ]
    yield tuple((place - 4) // 2 for place in order)


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_gaps_are_drawn_by_the_power_law_without_repetition(power_a):
  p = np.arange(1, 7.0) ** (power_a - 1.0)
  p /= p.sum()
  count = 8_000
  seen = np.zeros((6, 6))
  for pair in gaps(power_a, count):
    seen[pair] += 1
  # The first by p, the second by p among the others: P(i, j) = p_i p_j / (1 - p_i).
  expected = np.array(
    [[0.0 if i == j else p[i] * p[j] / (1.0 - p[i]) for j in range(6)] for i in range(6)]
  )
  deviation = (seen - count * expected) / np.sqrt(np.maximum(count * expected, 1.0))
  assert np.abs(deviation).max() < 4.5


def test_filler_is_uniform_over_the_vocabulary():
  task = recall.make(seq_len=64, seed=0, pairs=1, vocab_size=16)
  records = [task.valid[index] for index in range(500)]
  filler = np.concatenate([r["inputs"][2:][r["weights"][2:] == 0] for r in records])
  counts = np.bincount(filler, minlength=16)
  assert np.abs(counts - filler.size / 16).max() < 5 * np.sqrt(filler.size / 16)


def test_the_default_is_zoology_s():
  task = recall.make(seq_len=64, seed=0)
  assert (task.vocab_size, task.valid[0]["weights"].sum()) == (8192, 4)
  assert task.baselines["chance"] == 12.0


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"seq_len": 63}, "must be even, got 63"),
    ({"seq_len": 64, "pairs": 17}, "with 17 pairs must be at least 68, got 64"),
    ({"seq_len": 64, "pairs": 0}, "recall:pairs must be at least 1, got 0"),
    ({"seq_len": 64, "vocab_size": 9}, "vocab_size with 4 pairs must be at least 10, got 9"),
    ({"seq_len": 64, "power_a": 0.0}, "power_a must be positive, got 0.0"),
  ],
)
def test_bad_sizes(settings, message):
  with pytest.raises(ValueError, match=message):
    recall.make(seed=0, **settings)
