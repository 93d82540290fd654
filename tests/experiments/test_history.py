"""History: what a killed, resumed or broken run leaves behind is read as what it is."""

import json
import math

import pytest

from experiments import history


def write(folder, *rows, tail=""):
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
  return history.read(folder)


def train(step, loss=1.0, **more):
  return {"kind": "train", "step": step, "time": float(step), "loss": loss, **more}


def test_no_run_is_one_sentence_with_the_path(tmp_path):
  with pytest.raises(ValueError, match="no metrics.jsonl") as error:
    history.read(tmp_path)
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_file_is_a_run_without_numbers(tmp_path):
  run = write(tmp_path)
  assert run.final is None and run.steps == 0 and run.seconds == 0 and run.lines == []


@pytest.mark.parametrize("tail", ['{"kind": "tra', '{"kind": "train", "step"', "\x00\x00\x00", "{"])
def test_a_torn_last_line_is_left_out_and_counted(tmp_path, tail):
  run = write(tmp_path, train(1), train(2), tail=tail)
  assert [row["step"] for row in run.train] == [1, 2]
  assert run.unreadable == 1


def test_torn_in_the_middle_too(tmp_path):
  run = write(
    tmp_path, train(1), '{"kind": "train", "st' + json.dumps(train(2)), train(3), "[1]", ""
  )
  assert [row["step"] for row in run.train] == [1, 3]
  assert run.unreadable == 1


def test_bytes_that_are_no_text(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + json.dumps(train(7)).encode() + b"\n")
  run = history.read(tmp_path)
  assert run.steps == 7 and run.unreadable == 1


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1.0", True, [1]])
def test_what_is_no_finite_number_is_absent(tmp_path, value):
  run = write(tmp_path, train(1, 2.0), {**train(2), "loss": value})
  assert run.final == ("training", 1, 2.0)
  assert math.isnan(run.quality(run.train[1]))


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path):
  run = write(
    tmp_path,
    {"kind": "start", "step": 0, "time": 0.0, "resumed_from": None},
    *(train(step, 1.0) for step in (10, 20, 30)),
    {"kind": "valid", "step": 30, "time": 30.0, "loss": 9.0},
    {"kind": "start", "step": 20, "time": 100.0, "resumed_from": 20},
    {**train(25, 3.0), "time": 105.0},
  )
  assert [(row["step"], row["loss"]) for row in run.train] == [(10, 1.0), (20, 1.0), (25, 3.0)]
  assert run.valid == []
  assert run.seconds == 30 + 5  # the pause between the two lives is not work
  assert len(run.starts) == 2


def test_an_evaluation_long_after_is_not_the_run_s_time(tmp_path):
  later = {"kind": "evaluation", "step": 30, "time": 9000.0, "loss": 1.0}
  run = write(tmp_path, {"kind": "start", "step": 0, "time": 0.0}, train(30), later)
  assert run.seconds == 30


def test_steps_without_a_row_count_where_the_run_was_stopped_or_resumed(tmp_path):
  start = {"kind": "start", "step": 0, "time": 0.0}
  stopped = {"kind": "event", "step": 57, "time": 57.0}
  assert write(tmp_path, start, train(50), stopped).steps == 57
  again = {**start, "time": 99.0, "step": 57, "resumed_from": 57}
  assert write(tmp_path, start, train(50), stopped, again).steps == 57
  back = {**start, "time": 99.0, "step": 40, "resumed_from": 40}  # what came after was undone
  assert write(tmp_path, start, train(50), stopped, back).steps == 40


def test_a_fresh_start_in_the_same_folder_forgets_everything(tmp_path):
  run = write(tmp_path, train(10), {"kind": "start", "time": 50.0}, train(5))
  assert [row["step"] for row in run.train] == [5]


def test_the_last_row_of_a_step_counts(tmp_path):
  run = write(tmp_path, train(10, 5.0), train(20, 4.0), train(10, 6.0))
  assert [(row["step"], row["loss"]) for row in run.train] == [(10, 6.0), (20, 4.0)]


def test_bits_come_from_bits_or_from_nats(tmp_path):
  run = write(tmp_path, train(1, math.log(2) * 3), train(2, 99.0, bits=2.5))
  assert run.in_bits and run.unit == "bits per byte"
  assert run.quality(run.train[0]) == pytest.approx(3.0)
  assert run.quality(run.train[1]) == 2.5


def test_a_task_without_bits_is_told_in_nats_and_so_are_its_baselines(tmp_path):
  (tmp_path / "data_card.json").write_text('{"baselines": {"chance": 4.0}, "optimum": 0.25}')
  (tmp_path / "config.json").write_text('{"task": "recall"}')
  run = write(tmp_path, train(1, 0.7))
  assert run.unit == "nats per token"
  heights = {line.name: (line.value, line.is_optimum) for line in run.lines}
  assert heights == {"chance": (pytest.approx(4 * math.log(2)), False), "optimum": (0.25, True)}


@pytest.mark.parametrize("bits", [True, False])
def test_the_start_row_decides_the_unit(tmp_path, bits):
  start = {"kind": "start", "step": 0, "time": 0.0, "bits": bits}
  run = write(tmp_path, start, train(1, math.log(2), bits=1.0))
  assert run.unit == ("bits per byte" if bits else "nats per byte")
  assert run.quality(run.train[0]) == pytest.approx(1.0 if bits else math.log(2))


def test_the_optimum_is_converted_to_the_unit_of_the_curve(tmp_path):
  start = {"kind": "start", "step": 0, "time": 0.0, "optimum": math.log(2)}
  run = write(tmp_path, start, train(1, 1.0, bits=1.4))
  assert run.optimum == pytest.approx(1.0)


def test_baselines_from_wherever_they_were_written(tmp_path):
  (tmp_path / "data_card.json").write_text('{"baselines": {"unigram": 4.0, "gzip": null}}')
  run = write(
    tmp_path,
    {"kind": "baselines", "step": 0, "time": 1.0, "bigram": 3.0, "unigram": 4.5},
    train(1, bits=2.0),
  )
  assert dict(run.baselines) == {"unigram": 4.5, "bigram": 3.0}


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null"])
def test_a_broken_card_is_an_empty_card(tmp_path, content):
  (tmp_path / "data_card.json").write_text(content)
  (tmp_path / "config.json").write_text(content)
  run = write(tmp_path, train(1))
  assert run.card == {} and run.config == {}
