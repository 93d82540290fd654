"""Figures of a run: curves that label themselves, drawn the same way every time.

Each figure is a plain `matplotlib.figure.Figure`, rendered by Agg to PNG bytes: no pyplot, no
global state, no clock, so equal numbers give equal bytes. A theme is data, and every figure exists
in a light and a dark one.
"""

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

DPI = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
  """The colors of a figure."""

  surface: str
  ink: str
  muted: str
  grid: str
  train: str
  valid: str
  optimum: str


LIGHT = Theme(
  surface="#ffffff",
  ink="#1d2430",
  muted="#697386",
  grid="#e6e9ee",
  train="#9db8dc",
  valid="#1f5fb4",
  optimum="#20803f",
)
DARK = Theme(
  surface="#161b22",
  ink="#e4e8ee",
  muted="#98a2b3",
  grid="#2a313c",
  train="#4d6f9e",
  valid="#7db4ff",
  optimum="#63c584",
)
THEMES: Mapping[str, Theme] = {"light": LIGHT, "dark": DARK}


class Series(tuple[np.ndarray, np.ndarray]):
  """Points (steps, values), with whatever is not finite left out."""

  def __new__(cls, steps: Iterable[float], values: Iterable[float]) -> "Series":
    """Keeps the finite points, in order of step."""
    points = np.array([(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)])
    points = points.reshape(-1, 2)
    points = points[np.argsort(points[:, 0], kind="stable")]
    return super().__new__(cls, (points[:, 0], points[:, 1]))

  @property
  def steps(self) -> np.ndarray:
    """Where the points are."""
    return self[0]

  @property
  def values(self) -> np.ndarray:
    """What was measured there; all finite."""
    return self[1]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
  """A horizontal line to compare with; `is_optimum` marks the best that is possible at all."""

  name: str
  value: float
  is_optimum: bool = False


def png(figure: Figure) -> bytes:
  """The figure as PNG bytes, without the metadata that would tell two equal figures apart."""
  buffer = io.BytesIO()
  FigureCanvasAgg(figure)
  figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
  return buffer.getvalue()


def number(value: float, digits: int = 3) -> str:
  """A number for people: 1234567 is `1.23M`, 0.0003 is `0.0003`."""
  if not math.isfinite(value):
    return "not finite"
  for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= factor * (1 - 0.5 * 10**-digits):
      return f"{_trimmed(value / factor, digits)}{letter}"
  return _trimmed(value, digits)


def _trimmed(value: float, digits: int) -> str:
  text = f"{value:.{digits}g}"
  return f"{float(text):g}" if "e" in text and abs(value) >= 1 else text


def curves(
  train: Series,
  valid: Series,
  lines: Sequence[Line] = (),
  *,
  label: str,
  theme: Theme = LIGHT,
  descending: bool = True,
) -> Figure:
  """Training and validation against the step, with lines to compare them with.

  Args:
    train: the noisy curve, drawn light; its running mean is drawn over it.
    valid: the curve that counts, drawn bold; its last point is written out.
    lines: baselines and the optimum, dashed, named at the right edge.
    label: what the height means, with its unit.
    theme: the colors.
    descending: whether low is good; decides which outliers the picture may leave out.
  """
  figure, axes = _canvas(6.4, 3.9, theme, left=0.46, right=1.36, label=label)
  if train.steps.size:
    axes.plot(*train, color=theme.train, linewidth=0.8, alpha=0.55, zorder=2)
    mean, marker = smooth(train.values), "o" if train.steps.size == 1 else ""
    axes.plot(
      train.steps, mean, color=theme.train, linewidth=1.8, zorder=3, marker=marker, markersize=3.6
    )
  if valid.steps.size:
    marker = "o" if valid.steps.size <= 40 else ""
    axes.plot(*valid, color=theme.valid, linewidth=2.2, zorder=4, marker=marker, markersize=3.6)
  for line in lines:
    color = theme.optimum if line.is_optimum else theme.muted
    axes.axhline(line.value, color=color, linewidth=1.0, dashes=(5, 3), zorder=1)
  low, high = _limits(train.values, valid.values, lines, descending)
  axes.set_ylim(low, high)
  labels = [
    (
      line.value,
      f"{_plain(line.name)} {line.value:.2f}",
      theme.optimum if line.is_optimum else theme.muted,
    )
    for line in lines
  ]
  if valid.steps.size:
    labels.append((valid.values[-1], f"validation {valid.values[-1]:.2f}", theme.valid))
  if train.steps.size and (not valid.steps.size or _apart(train, valid, (high - low) * 0.02)):
    value = smooth(train.values)[-1]
    labels.append((value, f"training {value:.2f}", theme.train))
  _right_labels(axes, labels)
  return figure


def _plain(name: str) -> str:
  """A name that fits beside a figure and that its font can draw."""
  return "".join(c if c.isascii() and c.isprintable() else "?" for c in name[:14])


def trace(
  series: Series,
  *,
  label: str,
  theme: Theme = LIGHT,
  width: float = 4.2,
  from_zero: bool = False,
  median: bool = False,
) -> Figure:
  """One small curve: a quantity against the step, and its median where that is what matters."""
  if median and series.values.size:
    label = f"{label}, median {number(float(np.median(series.values)))}"
  figure, axes = _canvas(width, 2.3, theme, left=0.56, right=0.14, label=label)
  axes.plot(*series, color=theme.valid, linewidth=1.4)
  if from_zero and series.values.size:
    axes.set_ylim(0, max(float(series.values.max()) * 1.15, 1e-9))
  return figure


def _canvas(
  width: float, height: float, theme: Theme, *, left: float, right: float, label: str
) -> tuple[Figure, Axes]:
  """An empty plot in inches: its label on top, where no head must turn to read it; steps below."""
  figure = Figure(figsize=(width, height), facecolor=theme.surface)
  below, above = 0.5, 0.36
  box = (left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height)
  axes = figure.add_axes(box, facecolor=theme.surface)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(theme.muted)
  axes.grid(axis="y", color=theme.grid, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(axis="both", colors=theme.muted, labelsize=9, length=0, pad=4)
  axes.tick_params(axis="x", length=3)
  axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
  axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
  axes.margins(x=0.015)
  axes.set_xlabel("step", color=theme.muted, fontsize=9, loc="right", labelpad=2)
  figure.text(
    0.08 / width,
    1 - 0.12 / height,
    label,
    color=theme.ink,
    fontsize=10,
    fontweight="bold",
    va="top",
    parse_math=False,
  )
  return figure, axes


def smooth(values: np.ndarray) -> np.ndarray:
  """A centered running mean over a fortieth of the curve: calm, and no later than the truth."""
  half = max(1, values.size // 80)
  total = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(values.size)
  first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
  return (total[last] - total[first]) / (last - first)


def _limits(
  train: np.ndarray, valid: np.ndarray, lines: Sequence[Line], descending: bool
) -> tuple[float, float]:
  """Heights that show all lines and nearly all of the curves; the first drop may leave the top."""
  heights = [line.value for line in lines]
  baselines = [line.value for line in lines if not line.is_optimum]
  everything = np.concatenate([train, valid, np.asarray(heights, float)])
  if not everything.size:
    return 0.0, 1.0
  low, high = float(everything.min()), float(everything.max())
  if descending and train.size >= 20:
    settled = [float(np.quantile(train, 0.97)), *train[-1:], *valid[1:], *heights]
    ceiling = [1.25 * max(heights), *train[-1:], *valid[-1:]] if baselines else settled
    high = min(high, 1.05 * max(settled), 1.05 * max(ceiling))
  margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
  return low - margin, high + margin


def _apart(train: Series, valid: Series, distance: float) -> bool:
  return abs(smooth(train.values)[-1] - valid.values[-1]) > distance


def _right_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
  """Names at the right edge, level with what they name, moved apart where they would overlap."""
  low, high = axes.get_ylim()
  gap = 0.062 * (high - low)
  ordered = sorted(labels, key=lambda item: item[0])
  heights = spread([min(max(value, low), high) for value, _, _ in ordered], gap, low, high)
  for (_, text, color), height in zip(ordered, heights, strict=True):
    axes.annotate(
      text,
      (1, height),
      xycoords=("axes fraction", "data"),
      xytext=(6, 0),
      textcoords="offset points",
      ha="left",
      va="center",
      color=color,
      fontsize=9.5,
      fontweight="bold" if text.startswith("validation") else "normal",
      annotation_clip=False,
      parse_math=False,
    )


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
  """Ascending heights moved as little as needed so that neighbors are `gap` apart."""
  placed = list(heights)
  for _ in range(200):
    moved = False
    for i in range(len(placed) - 1):
      overlap = gap - (placed[i + 1] - placed[i])
      if overlap > gap * 1e-3:
        placed[i] -= overlap / 2
        placed[i + 1] += overlap / 2
        moved = True
    if not moved:
      break
  shift = max(low - placed[0], 0) if placed else 0
  shift = min(high - placed[-1], 0) if placed and placed[-1] > high else shift
  return [height + shift for height in placed]
