"""The byte task: what is encoded comes back, and the split is scored to the byte."""

import dataclasses

import pytest

from experiments.data.source import EpochSource
from experiments.tasks import text


@dataclasses.dataclass(frozen=True)
class Data:
  path: str = ""
  valid_fraction: float = 0.1


@pytest.fixture
def path(tmp_path):
  (tmp_path / "x.txt").write_bytes(bytes(range(32, 127)) * 100)
  return str(tmp_path / "x.txt")


def test_text_goes_round():
  for sample in ("def f():\n\treturn 1", "Grüße, 世界, 🙂", ""):
    assert text.decode(text.encode(sample)) == sample
  assert text.decode([0xFF, 0x61, 0xC3]) == "\ufffda\ufffd"  # no UTF-8, and a letter cut in half


def test_the_task(path):
  task = text.make(seq_len=50, seed=0, data=Data(path))
  assert (task.vocab_size, task.optimum, task.bits) == (256, None, True)
  assert task.card.train_bytes + task.card.valid_bytes == 9500
  assert sum(record["weights"].sum() for record in task.valid) == task.card.valid_bytes == 950
  assert len(task.train) == (8550 - 1) // 50
  assert task.prompt
  # One byte always follows another here, so that two bytes tell everything.
  assert task.baselines["bigram"] < 0.5 < 6.0 < task.baselines["unigram"]


def test_the_windows_of_later_epochs_depend_on_the_seed(path):
  one, two = (text.make(seq_len=50, seed=seed, data=Data(path)).train for seed in (0, 1))
  assert isinstance(one, EpochSource) and isinstance(two, EpochSource)

  def first(source, epoch):
    return source.epoch(epoch)[0]["inputs"].tolist()

  assert first(one, 0) == first(two, 0)
  assert any(first(one, epoch) != first(two, epoch) for epoch in (1, 2, 3))


@pytest.mark.parametrize(
  ("seq_len", "message"),
  [
    (950, r"held-out text has 950 bytes.*seq_len \+ 1 = 951"),
    (8550, r"training text has 8550 bytes.*seq_len \+ 1 = 8551"),
  ],
)
def test_a_text_shorter_than_the_context(path, seq_len, message):
  with pytest.raises(ValueError, match=message):
    text.make(seq_len=seq_len, seed=0, data=Data(path))


def test_the_default_is_the_standard_library_and_its_baselines_are_known():
  task = text.make(seq_len=256, seed=0, data=Data())
  assert task.card.name == "stdlib"
  assert task.decode(task.prompt).strip() == "def"
  assert task.baselines["unigram"] == pytest.approx(4.7, abs=0.25)
  assert task.baselines["bigram"] == pytest.approx(3.6, abs=0.2)
  assert task.baselines["gzip"] == pytest.approx(1.9, abs=0.2)
