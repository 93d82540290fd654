"""Figures: equal bytes, nothing global touched, and the numbers that must be visible are."""

import math
import struct

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from experiments import figures
from experiments.figures import Line, Series


def texts(figure):
  """Every text of a figure that is drawn."""
  return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def limits(figure):
  return figure.axes[0].get_ylim()


def falling(count=100):
  steps = np.arange(1, count + 1)
  return Series(steps, 2.0 + 6.0 * np.exp(-steps / 5))


def test_series_drops_what_is_not_finite_and_sorts():
  series = Series([3, 1, 2, 4], [30.0, 10.0, math.nan, math.inf])
  np.testing.assert_array_equal(series.steps, [1, 3])
  np.testing.assert_array_equal(series.values, [10.0, 30.0])


def test_series_needs_a_value_for_each_step():
  with pytest.raises(ValueError):
    Series([1, 2], [1.0])


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0, "0"),
    (0.0003, "0.0003"),
    (2.5, "2.5"),
    (999, "999"),
    (999.9, "1k"),
    (1234, "1.23k"),
    (1_832_448, "1.83M"),
    (4.5e10, "45G"),
    (-1500, "-1.5k"),
    (math.nan, "not finite"),
  ],
)
def test_number(value, text):
  assert figures.number(value) == text


def test_equal_numbers_give_equal_bytes_and_leave_matplotlib_alone():
  before = dict(matplotlib.rcParams)
  draw = lambda: figures.png(figures.curves(falling(), falling(5), [Line("gzip", 1.9)], label="x"))
  first, second = draw(), draw()
  assert first == second
  assert dict(matplotlib.rcParams) == before
  assert b"Software" not in first


def test_size_of_the_picture():
  image = figures.png(figures.curves(falling(), falling(5), label="x"))
  assert struct.unpack(">II", image[16:24]) == (1280, 780)
  image = figures.png(figures.trace(falling(), label="x"))
  assert struct.unpack(">II", image[16:24]) == (840, 460)


def test_the_last_validation_and_every_line_are_written_out():
  lines = [Line("unigram", 4.744), Line("optimum", 1.5, is_optimum=True)]
  shown = texts(figures.curves(falling(), Series([50, 100], [2.2, 2.137]), lines, label="Bits"))
  assert {"unigram 4.74", "optimum 1.50", "validation 2.14", "Bits"} <= set(shown)


def test_every_line_lies_inside_the_picture():
  lines = [Line("low", -3.0), Line("high", 20.0)]
  low, high = limits(figures.curves(falling(), falling(), lines, label="x"))
  assert low < -3 < 20 < high


def test_the_first_drop_may_leave_the_picture_but_the_end_may_not():
  train = Series(np.arange(100), [1e6, *([2.0] * 98), 3.0])
  low, high = limits(figures.curves(train, Series([100], [2.5]), label="x"))
  assert low < 2.0 and 3.0 < high < 1e3


def test_a_run_that_ends_worse_than_every_baseline_still_shows_its_end():
  valid = Series([0, 100], [8.0, 7.9])
  train = Series(np.arange(100), np.full(100, 8.0))
  low, high = limits(figures.curves(train, valid, [Line("gzip", 1.9)], label="x"))
  assert low < 1.9 and high > 7.9


@pytest.mark.parametrize("values", [[], [1.0], [0.0, 0.0], [math.nan]])
def test_little_or_nothing_to_draw(values):
  series = Series(range(len(values)), values)
  for theme in figures.THEMES.values():
    assert figures.png(figures.curves(series, series, label="x", theme=theme))
    assert figures.png(figures.trace(series, label="x", theme=theme, from_zero=True, median=True))


def test_names_with_dollars_are_not_mathematics():
  assert figures.png(figures.curves(falling(), falling(), [Line("a $x^", 2.0)], label="$_"))


def test_labels_at_the_same_height_are_moved_apart():
  heights = figures.spread([2.0, 2.0, 2.01, 5.0], 0.3, 0.0, 10.0)
  assert min(np.diff(heights)) >= 0.29
  assert heights[-1] == 5.0
  assert abs(np.mean(heights[:3]) - 2.003) < 0.01


def test_crowded_labels_stay_in_the_picture():
  heights = figures.spread([0.0, 0.0, 0.0], 1.0, 0.0, 10.0)
  assert heights[0] >= 0 and heights[-1] <= 10


def test_smoothing_keeps_a_constant_and_the_mean_of_a_line():
  np.testing.assert_allclose(figures.smooth(np.full(500, 3.0)), 3.0)
  line = np.linspace(0, 1, 401)
  np.testing.assert_allclose(figures.smooth(line)[10:-10], line[10:-10], atol=1e-12)


def test_a_run_of_one_measurement_names_its_step_and_no_fraction():
  one = Series([10], [4.6])
  axes = figures.curves(one, one, label="x").axes[0]
  low, high = axes.get_xlim()
  assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [10]
