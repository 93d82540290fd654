"""Are all bytes predicted, each once, from what stands before them?"""

import numpy as np
import pytest

from experiments.data.source import EpochSource
from experiments.data.windows import TrainWindows, ValidWindows

SIZES = [(11, 10), (12, 10), (20, 10), (21, 10), (22, 10), (1000, 7), (257, 256), (5, 1)]


def text_of(size):
  # No window twice, so that it tells its place: short texts count, the long one is noise.
  if size > 300:
    return np.random.default_rng(0).integers(256, size=size).astype(np.uint8)
  return (np.arange(size) % 256).astype(np.uint8)


def check_shapes(record, seq_len):
  assert {key: (value.shape, value.dtype) for key, value in record.items()} == {
    "inputs": ((seq_len,), np.int32),
    "targets": ((seq_len,), np.int32),
    "weights": ((seq_len,), np.float32),
  }


@pytest.mark.parametrize(("size", "seq_len"), SIZES)
def test_held_out_bytes_are_each_predicted_once(size, seq_len):
  text = text_of(size)
  predicted, before = [], []
  for record in ValidWindows(text, seq_len):
    check_shapes(record, seq_len)
    scored = record["weights"] == 1.0
    assert np.all(scored | (record["weights"] == 0.0))
    predicted += record["targets"][scored].tolist()
    before += record["inputs"][scored].tolist()
  assert predicted == text.tolist()
  assert before == [10, *text[:-1].tolist()]


@pytest.mark.parametrize(("size", "seq_len"), SIZES)
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_training_windows_cover_the_text(size, seq_len, epoch):
  text = text_of(size)
  source = TrainWindows(text, seq_len, seed=3)
  assert isinstance(source, EpochSource)
  source = source.epoch(epoch)
  assert len(source) == (size - 1) // seq_len
  places = []
  for record in source:
    check_shapes(record, seq_len)
    assert record["weights"].all()
    np.testing.assert_array_equal(record["inputs"][1:], record["targets"][:-1])
    # The text as a ring: each byte is predicted from the one before it.
    window = np.append(record["inputs"], record["targets"][-1]).astype(np.uint8)
    start = (text.tobytes() * 2).find(window.tobytes())
    assert 0 <= start < size
    places.append(start)
  gaps = np.diff(places) % size
  assert np.all(gaps == seq_len % size)
  if epoch == 0:
    assert places[0] == 0
    assert places[-1] + seq_len < size


def test_epochs_cut_at_other_places_and_repeatably():
  source = TrainWindows(text_of(1000), 64, seed=5)
  starts = [int(source.epoch(number)[0]["inputs"][0]) for number in range(6)]
  assert len(set(starts)) > 3
  again = TrainWindows(text_of(1000), 64, seed=5)
  assert starts == [int(again.epoch(number)[0]["inputs"][0]) for number in range(6)]
  other = TrainWindows(text_of(1000), 64, seed=6)
  assert starts != [int(other.epoch(number)[0]["inputs"][0]) for number in range(6)]


@pytest.mark.parametrize(
  ("kind", "what"), [(TrainWindows, "training text"), (ValidWindows, "held-out text")]
)
def test_short_texts_print_both_lengths(kind, what):
  with pytest.raises(ValueError, match=rf"{what} has 10 bytes.* seq_len \+ 1 = 11"):
    kind(text_of(10), 10)
  with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
    kind(text_of(10), 0)


@pytest.mark.parametrize("kind", [TrainWindows, ValidWindows])
@pytest.mark.parametrize("index", [-1, 100])
def test_no_record_beyond_the_end(kind, index):
  with pytest.raises(IndexError):
    kind(text_of(100), 10)[index]
