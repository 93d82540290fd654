"""TFLOP/s against length on a chip, a panel per mask and head width: drawn from results alone."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.benchmarks import picture
from experiments.benchmarks.picture import INK, MUTED

PEERS: Final[Mapping[str, tuple[str, str]]] = {
  "jax cuDNN": ("#697386", "s"),
  "jax XLA": ("#697386", "s"),
  "jax mgpu f16": ("#9c86b8", "v"),
  "tokamax": ("#8c7d5b", "^"),
  "torch flash": ("#b0625a", "D"),
  "torch cuDNN": ("#5a8f8a", "P"),
  "torch efficient": ("#c79a4b", "X"),
  "torch math": ("#b0625a", "D"),
}
OURS: Final = ("#1f5fb4", "o")
LINES: Final = tuple(
  (kind, mask) for kind in ("forward", "backward") for mask in ("full", "causal")
)


def draw(results: Mapping[str, Any]) -> bytes:
  """The page, as PNG bytes."""
  rows = results["times"]
  widths = sorted({case["H"] for case in results["cases"]})
  figure = picture.page(3.6 * max(3, len(widths)), 15.5)
  top, bottom = figure.subfigures(2, 1, height_ratios=(4, 1.35), squeeze=False)[:, 0]
  grid = top.subplots(len(LINES), len(widths), squeeze=False)
  for line, (kind, mask) in zip(grid, LINES, strict=True):
    for panel, H in zip(line, widths, strict=True):
      here = [r for r in rows if (r["kind"], r["mask"], r["H"]) == (kind, mask, H)]
      _lengths(panel, here, results["ours"])
      panel.set_title(f"{kind}, {mask}, H={H}", loc="left", color=INK, fontsize=10)
  partial = [case for case in results["cases"] if case["mask"] not in ("full", "causal")]
  _bars(bottom.subplots(), partial, rows, results["ours"])
  picture.legend(bottom, figure.axes, (results["ours"], *PEERS))
  title = picture.chip_title("Softmax attention", results)
  figure.suptitle(title, color=INK, fontsize=10)
  return picture.png(figure)


def _style(name: str, ours: str) -> tuple[str, str, str]:
  """Color, mark and line: ours is drawn through, peers are dashed."""
  return (*OURS, "-") if name == ours else (*PEERS[name], "--")


def _names(rows: Sequence[Mapping[str, Any]], ours: str) -> list[str]:
  """Who is in the rows, ours last, so that it is drawn on top."""
  return [name for name in (*PEERS, ours) if any(row["contender"] == name for row in rows)]


def _lengths(axes: Axes, rows: Sequence[Mapping[str, Any]], ours: str) -> None:
  for name in _names(rows, ours):
    points = sorted((row["T"], row["tflops"]) for row in rows if row["contender"] == name)
    xs, ys = zip(*points, strict=True)
    color, mark, line = _style(name, ours)
    axes.plot(
      xs, ys, label=name, color=color, marker=mark, linestyle=line, linewidth=1.8, markersize=4.5
    )
  axes.set_xscale("log", base=2)
  axes.set_ylim(bottom=0)
  axes.set_xlabel("T, tokens", color=MUTED)
  axes.set_ylabel("TFLOP/s", color=MUTED)
  axes.xaxis.set_major_formatter(FuncFormatter(picture.length))
  axes.xaxis.set_minor_locator(NullLocator())
  picture.quiet(axes)


def _bars(
  axes: Axes, cases: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], ours: str
) -> None:
  """Forward and backward together where a mask lets most pairs be skipped."""
  found = {
    (row["case"], row["contender"]): row["tflops"]
    for row in rows
    if row["kind"] == "forward+backward"
  }
  names = _names([row for row in rows if row["mask"] not in ("full", "causal")], ours)
  width = 0.8 / max(1, len(names))
  for index, name in enumerate(names):
    places = [
      (i + (index + 0.5) * width - 0.4, found[case["case"], name])
      for i, case in enumerate(cases)
      if (case["case"], name) in found
    ]
    if places:
      xs, heights = zip(*places, strict=True)
      axes.bar(xs, heights, width, label=name, color=_style(name, ours)[0])
  labels = [f"{case['mask']}\nH={case['H']}" for case in cases]
  axes.set_xticks(range(len(cases)), labels, fontsize=7)
  axes.set_ylabel("TFLOP/s of allowed pairs", color=MUTED)
  title = "forward and backward, windows and packed documents, at their T"
  axes.set_title(title, loc="left", color=INK, fontsize=10)
  picture.quiet(axes)
