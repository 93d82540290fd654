"""Progress: the meter against a clock that is set by hand, and rows in words."""

import pytest

from experiments import progress


class Clock:
  """Seconds that pass when it is told so."""

  now = 100.0

  def __call__(self) -> float:
    return self.now


def test_a_lap_counts_neither_pauses_nor_what_came_before_the_start():
  clock = Clock()
  meter = progress.Meter(clock)
  clock.now += 60  # compiling
  meter.start(1)
  clock.now += 3
  with meter.pause():
    clock.now += 50
  clock.now += 5
  assert meter.lap(5) == (3 + 5) / 4
  assert meter.lap(5) is None
  clock.now += 6
  assert meter.lap(8) == 2.0  # a pause belongs to its own lap


def test_a_pause_that_fails_is_over():
  clock = Clock()
  meter = progress.Meter(clock)
  with pytest.raises(KeyError), meter.pause():
    clock.now += 50
    raise KeyError
  clock.now += 4
  assert meter.lap(2) == 2.0


def test_the_time_left_is_at_the_pace_of_all_time_since_the_start():
  clock = Clock()
  meter = progress.Meter(clock)
  clock.now += 60
  meter.start(10)
  assert meter.seconds_left(10, 100) is None
  clock.now += 10
  with meter.pause():
    clock.now += 20
  meter.lap(20)
  assert meter.seconds_left(20, 100) == 3.0 * 80
  assert meter.seconds_left(100, 100) == 0.0


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.4, "0:00"), (59.6, "1:00"), (309, "5:09"), (3599.7, "1:00:00"), (3909, "1:05:09")],
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text


def test_a_row_in_words_leaves_out_what_is_not_known():
  row = {"loss": 2.0, "bits": 2.88539, "memory_bytes": 1.5e9}
  known = {"tokens_per_second": 12345.6, "mfu": 0.456, "seconds_left": 0.0}
  assert progress.describe(row) == "loss 2.000 (2.885 bits)  1.50 GB"
  assert progress.describe(row | known) == (
    "loss 2.000 (2.885 bits)  12,346 tokens/s  MFU 46 %  1.50 GB  0:00 left"
  )
  assert progress.describe(row | dict.fromkeys(known)) == progress.describe(row)


def test_a_display_elsewhere_tells_a_line_now_and_then_and_the_last(capsys, monkeypatch):
  row = {"loss": 2.0, "bits": 2.88539, "memory_bytes": 1.5e9}
  clock = Clock()
  monkeypatch.setattr(progress.time, "monotonic", clock)
  with progress.Display(4, every_seconds=5.0) as display:
    for step in (1, 2, 3, 4):
      display.update(step, row)
      clock.now += 3.0
  told = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
  assert told == ["1/4", "3/4", "4/4"]
  with progress.Display(4, active=False) as silent:
    silent.update(4, row)
  assert capsys.readouterr().err == ""
