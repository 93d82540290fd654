"""make_task: names, options, and a sentence for what it does not know."""

import dataclasses

import pytest

from experiments.tasks import TASKS, make_task


@dataclasses.dataclass(frozen=True)
class Data:
  path: str = ""
  valid_fraction: float = 0.1


def make(name, seq_len=64, **data):
  return make_task(name, seq_len=seq_len, seed=0, data=Data(**data))


def test_the_names():
  assert list(TASKS) == ["bytes", "copy", "selective_copy", "induction", "recall", "hmm"]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "bytes"])
def test_generated_tasks_are_made_by_name(name):
  task = make(name)
  assert task.name == name
  assert task.optimum is not None and task.optimum >= 0.0


def test_bytes_reads_the_path(tmp_path):
  (tmp_path / "x.txt").write_bytes(b"some text " * 200)
  task = make("bytes", path=str(tmp_path / "x.txt"), valid_fraction=0.5)
  assert (task.card.name, task.card.valid_bytes) == ("files", 1000)


def test_options():
  task = make("recall:pairs=2:vocab_size=64:power_a=1:random_non_queries=False")
  assert task.vocab_size == 64
  assert task.valid[0]["weights"].sum() == 2
  assert (task.valid[0]["inputs"] == 0).sum() == 64 - 6


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("byte", "task 'byte' is unknown; did you mean 'bytes'\\?"),
    ("xyzzy", "task 'xyzzy' is unknown; choose from bytes, copy"),
    ("recall:pair=3", "no option 'pair'; did you mean 'pairs'\\?"),
    ("bytes:path=x", "task bytes has no option 'path'; it has no options"),
    ("recall:pairs=many", "pairs must be of type int, got 'many'"),
    ("recall:pairs=1.5", "pairs must be of type int, got '1.5'"),
    ("recall:pairs", "pairs must be of type int, got ''"),
    ("recall:random_non_queries=1", "random_non_queries must be of type bool, got '1'"),
  ],
)
def test_misspelt(name, message):
  with pytest.raises(ValueError, match=message):
    make(name)


def test_a_path_that_nothing_reads_is_refused():
  with pytest.raises(
    ValueError, match="'x.txt' is for the task bytes; the task copy makes its own"
  ):
    make("copy", path="x.txt")
