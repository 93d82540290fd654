"""Is the batch at a step the same, whoever reads it, from wherever the reading began?"""

import functools
import itertools
import time

import numpy as np
import pytest

from experiments.data.pipeline import batches
from experiments.data.windows import TrainWindows, ValidWindows
from experiments.tasks import copy


class Numbers:
  """Record i holds i."""

  def __init__(self, size, seq_len=3):
    self.size, self.seq_len = size, seq_len

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    tokens = np.full(self.seq_len, index, np.int32)
    return {"inputs": tokens, "targets": tokens, "weights": np.ones(self.seq_len, np.float32)}


def take(count, *args, **kwargs):
  return list(itertools.islice(batches(*args, **kwargs), count))


def ids(batch):
  return batch["inputs"][:, 0].tolist()


def equal(one, two):
  return one.keys() == two.keys() and all(
    np.array_equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one
  )


def text(size=4096):
  return np.random.default_rng(0).integers(256, size=size).astype(np.uint8)


def test_shapes_and_types():
  (batch,) = take(1, Numbers(100), batch_size=8, seed=0, process_index=1, process_count=2)
  assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
    "inputs": ((4, 3), np.int32),
    "targets": ((4, 3), np.int32),
    "weights": ((4, 3), np.float32),
  }


@pytest.mark.parametrize("source", [Numbers(37), TrainWindows(text(), 61, seed=1)], ids=type)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_processes_together_read_the_global_batch(source, count, start):
  whole = take(12, source, batch_size=8, seed=3, start_step=start)
  parts = [
    take(12, source, batch_size=8, seed=3, start_step=start, process_index=p, process_count=count)
    for p in range(count)
  ]
  for step, batch in enumerate(whole):
    joined = {key: np.concatenate([part[step][key] for part in parts]) for key in batch}
    assert equal(joined, batch)


@pytest.mark.parametrize("source", [Numbers(37), TrainWindows(text(), 61, seed=1)], ids=type)
@pytest.mark.parametrize("start", [1, 4, 5, 17])
def test_a_restart_goes_on_where_it_was(source, start):
  whole = take(24, source, batch_size=8, seed=3)
  tail = take(24 - start, source, batch_size=8, seed=3, start_step=start)
  assert all(equal(*pair) for pair in zip(whole[start:], tail, strict=True))


def test_each_epoch_reads_everything_once_in_an_order_of_its_own():
  read = [i for batch in take(12, Numbers(32), batch_size=8, seed=0) for i in ids(batch)]
  epochs = [read[start : start + 32] for start in (0, 32, 64)]
  assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert epochs[0] != list(range(32))


def test_epochs_that_end_within_a_batch():
  read = [i for batch in take(37, Numbers(37), batch_size=8, seed=0) for i in ids(batch)]
  assert all(sorted(read[s : s + 37]) == list(range(37)) for s in range(0, 37 * 8, 37))


def test_a_generated_source_is_read_far_and_wide():
  source = copy.make(seq_len=8, seed=0).train
  whole = take(3, source, batch_size=4, seed=0, start_step=10**6)
  half = take(3, source, batch_size=4, seed=0, start_step=10**6, process_index=1, process_count=2)
  assert all(np.array_equal(w["inputs"][2:], h["inputs"]) for w, h in zip(whole, half, strict=True))
  read = ids(take(1, Numbers(len(source)), batch_size=256, seed=0)[0])
  assert len(set(read)) == 256
  assert min(read) < 2**27 and max(read) > 2**31 - 2**27


def test_seeds_are_orders_and_any_size_of_seed_will_do():
  orders = [ids(take(1, Numbers(64), batch_size=64, seed=s)[0]) for s in (0, 1, 2**32, 2**40 + 1)]
  assert len({tuple(order) for order in orders}) == 4


def test_later_epochs_move_the_windows():
  source = TrainWindows(text(), 64, seed=1)
  steps = len(source)  # one batch_size=1 step per record
  first, second = (
    {batch["inputs"].tobytes() for batch in take(steps, source, batch_size=1, seed=0, start_step=s)}
    for s in (0, steps)
  )
  assert len(first) == len(second) == steps
  assert not first & second
  assert second == {source.epoch(1)[i]["inputs"].tobytes() for i in range(steps)}


@pytest.mark.parametrize("size", [1, 7, 8, 9, 24, 37])
@pytest.mark.parametrize("count", [1, 4])
def test_one_reading_scores_everything_once(size, count):
  parts = [
    list(
      batches(
        Numbers(size), batch_size=8, seed=0, repeat=False, process_index=p, process_count=count
      )
    )
    for p in range(count)
  ]
  assert {len(part) for part in parts} == {-(-size // 8)}
  scored = []
  for batch in itertools.chain(*parts):
    assert batch["inputs"].shape == (8 // count, 3)
    scored += batch["inputs"][batch["weights"] > 0].tolist()
  assert sorted(scored) == sorted(list(range(size)) * 3)


def test_one_reading_is_exact_per_byte_and_a_short_one_is_spread():
  source = ValidWindows(text(5000), 64)
  read = list(batches(source, batch_size=16, seed=0, repeat=False))
  assert sum(batch["weights"].sum() for batch in read) == 5000
  firsts = ids(take(1, Numbers(1000), batch_size=50, seed=0, repeat=False)[0])
  assert min(firsts) < 200 and max(firsts) > 800


def test_one_reading_restarts_and_ends():
  whole = list(batches(Numbers(37), batch_size=8, seed=0, repeat=False))
  tail = list(batches(Numbers(37), batch_size=8, seed=0, repeat=False, start_step=3))
  assert all(equal(*pair) for pair in zip(whole[3:], tail, strict=True))
  assert list(batches(Numbers(37), batch_size=8, seed=0, repeat=False, start_step=9)) == []


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"batch_size": 6, "process_count": 4}, r"multiple .* batch_size=6 and 4 processes"),
    ({"batch_size": 8, "process_count": 0}, r"multiple .* batch_size=8 and 0 processes"),
    ({"batch_size": 8, "process_index": 2, "process_count": 2}, r"lie in \[0, 2\), got 2"),
    ({"batch_size": 8, "seed": -1}, "must not be negative, got -1 and 0"),
    ({"batch_size": 8, "start_step": -2}, "must not be negative, got 0 and -2"),
    ({"batch_size": 64}, "has 37 records, fewer than one batch of batch_size=64"),
  ],
)
def test_one_sentence_each(settings, message):
  with pytest.raises(ValueError, match=message):
    functools.partial(batches, Numbers(37), seed=0)(**settings)


def test_it_is_quick_and_a_far_step_costs_no_more():
  source = TrainWindows(text(1 << 20), 256)
  iterator = batches(source, batch_size=16, seed=0, start_step=10**9)
  next(iterator)
  start = time.perf_counter()
  for _ in range(100):
    next(iterator)
  # Some 700 batches a second; the bound allows for a busy machine.
  assert time.perf_counter() - start < 2.0
