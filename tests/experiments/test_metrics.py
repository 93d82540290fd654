"""metrics.jsonl: rows survive kills, torn lines and resumption."""

import json

import numpy as np
import pytest

from experiments import metrics
from experiments.flags import UserError


def rows(workdir):
  return [(row["kind"], row["step"]) for row in metrics.read(workdir)]


def fill(workdir, steps):
  with metrics.Metrics(workdir) as out:
    for step in steps:
      out.write("train", step, loss=float(step))


def test_rows_are_on_disk_at_once(tmp_path):
  with metrics.Metrics(tmp_path) as out:
    out.write("train", 1, loss=2.0, name="x")
    (row,) = metrics.read(tmp_path)
    assert row["loss"] == 2.0 and row["name"] == "x" and row["time"] > 1e9


def test_rows_are_added_to_those_there(tmp_path):
  fill(tmp_path, [1, 2])
  fill(tmp_path, [3])
  assert rows(tmp_path) == [("train", 1), ("train", 2), ("train", 3)]


def test_numbers_of_numpy_and_jax_are_plain_and_what_is_not_finite_is_null(tmp_path):
  with metrics.Metrics(tmp_path) as out:
    out.write("train", 1, a=np.float32(0.5), b=float("nan"), c=[float("inf"), {"d": np.int64(3)}])
  (row,) = metrics.read(tmp_path)
  assert (row["a"], row["b"], row["c"]) == (0.5, None, [None, {"d": 3}])


@pytest.mark.parametrize("torn", ['{"kind": "tra', "\x00\x00", ""])
def test_a_torn_last_line_is_left_out_and_rewinding_removes_it(tmp_path, torn):
  fill(tmp_path, [1, 2])
  with (tmp_path / metrics.FILE).open("a") as file:
    file.write(torn)
  assert rows(tmp_path) == [("train", 1), ("train", 2)]
  metrics.rewind(tmp_path, 2)
  fill(tmp_path, [3])
  lines = (tmp_path / metrics.FILE).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("torn", [b'{"kind": "tra', b"\xff\x00"])
def test_a_row_never_joins_a_torn_line_and_the_run_goes_on(tmp_path, torn):
  fill(tmp_path, [1, 2])
  with (tmp_path / metrics.FILE).open("ab") as file:
    file.write(torn)
  fill(tmp_path, [2, 3])
  assert [step for _, step in rows(tmp_path)] == [1, 2, 2, 3]
  told: list[str] = []
  assert metrics.rewind(tmp_path, 2, tell=told.append) == 1
  assert [step for _, step in rows(tmp_path)] == [1, 2, 2]
  assert len(told) == 1 and told[0].endswith("passed over: 1")
  assert torn in (tmp_path / metrics.FILE).read_bytes().split(b"\n")


def test_rewind_drops_later_samples_too(tmp_path):
  (tmp_path / metrics.SAMPLES).write_text('{"step": 2}\n{"step": 4}\n{"st')
  assert metrics.rewind(tmp_path, 3) == 1
  assert (tmp_path / metrics.SAMPLES).read_text() == '{"step": 2}\n'


def test_rewind_drops_later_rows_only(tmp_path):
  fill(tmp_path, [1, 2, 3, 4])
  before = (tmp_path / metrics.FILE).read_text().splitlines()
  assert metrics.rewind(tmp_path, 2) == 2
  assert (tmp_path / metrics.FILE).read_text().splitlines() == before[:2]
  assert metrics.rewind(tmp_path, 2) == 0


def test_rewind_of_nothing_is_nothing(tmp_path):
  assert metrics.rewind(tmp_path, 0) == 0
  assert metrics.read(tmp_path) == []


def test_inactive_writes_nothing(tmp_path):
  with metrics.Metrics(tmp_path, active=False) as out:
    out.write("train", 1, loss=1.0)
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
  with pytest.raises(UserError, match=r"metrics\.jsonl"):
    metrics.Metrics(tmp_path / "absent")


def test_tensorboard_when_asked(tmp_path):
  with metrics.Metrics(tmp_path, tensorboard=True) as out:
    out.write("train", 1, loss=1.0)
  (events,) = tmp_path.glob("events.out.tfevents.*")
  assert b"train/loss" in events.read_bytes()
