"""Time and memory against length, on logarithmic scales: one page, drawn from the results alone."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, NullLocator

INK, MUTED, GRID = "#1d2430", "#697386", "#e6e9ee"
# Peers are gray and dashed, told apart by their marks; ours are colored.
STYLES: Final[Mapping[str, dict[str, Any]]] = {
  "jax.nn": {"color": "#697386", "linestyle": "--", "marker": "s"},
  "tokamax": {"color": "#8c7d5b", "linestyle": "--", "marker": "^"},
  "torch": {"color": "#b0625a", "linestyle": "--", "marker": "D"},
  "fla": {"color": "#9b8ca8", "linestyle": "--", "marker": "v"},
  "recurrence": {"color": "#b9bfc9", "linestyle": ":", "marker": "o"},
  "tiled": {"color": "#1f5fb4", "marker": "o"},
  "tiled, a device per core": {"color": "#1f5fb4", "linestyle": ":", "marker": "x"},
  "tiled, window 256": {"color": "#6a9fd8", "marker": "o"},
  "linear": {"color": "#20803f", "marker": "o"},
  "linear, a device per core": {"color": "#20803f", "linestyle": ":", "marker": "x"},
  "linear, elu+1": {"color": "#7cb342", "marker": "o"},
}
PANELS: Final = (
  ("times", "forward", "time, forward"),
  ("times", "forward+backward", "time, forward and backward"),
  ("memory", "forward", "memory added, forward"),
  ("memory", "forward+backward", "memory added, forward and backward"),
)


def draw(results: Mapping[str, Any]) -> bytes:
  """The page, as PNG bytes."""
  figure = page(11, 8.6)
  axes = figure.subplots(2, 2)
  for panel, (table, kind, title) in zip(axes.flat, PANELS, strict=True):
    _panel(panel, [row for row in results[table] if row["kind"] == kind], table, title)
  legend(figure, axes.flat, (*STYLES, "q, k, v and the output"), columns=4)
  figure.suptitle(_title(results), color=INK, fontsize=10)
  return png(figure)


def page(width: float, height: float) -> Figure:
  """An empty page, in inches."""
  figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
  FigureCanvasAgg(figure)
  return figure


def png(figure: Figure) -> bytes:
  """The page as a file; the same results give the same bytes."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
  return buffer.getvalue()


def legend(
  where: Figure | SubFigure, panels: Iterable[Axes], order: Iterable[str], columns: int = 9
) -> None:
  """Each name that some panel has drawn once, below everything, in this order."""
  handles = {}
  for panel in panels:
    drawn, names = panel.get_legend_handles_labels()
    handles = dict(zip(names, drawn, strict=True)) | handles
  names = [name for name in dict.fromkeys(order) if name in handles]
  where.legend(
    [handles[name] for name in names],
    names,
    loc="outside lower center",
    ncols=min(columns, max(1, len(names))),
    frameon=False,
    labelcolor=INK,
  )


def chip_title(what: str, results: Mapping[str, Any]) -> str:
  """Over a page of what was measured on a chip."""
  where = results["environment"]
  return (
    f"{what} on {where['device']}, {results['dtype']}, jax {where['versions']['jax']}, "
    f"{where['date'][:10]}; checks {results['checks']['verdict']}"
  )


def quiet(axes: Axes) -> None:
  """Gray axes and a faint grid, so that what is drawn stands out."""
  axes.tick_params(colors=MUTED)
  axes.grid(color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set_color(GRID)


def _title(results: Mapping[str, Any]) -> str:
  shape, where = results["shape"], results["environment"]
  return (
    f"Causal attention, B={shape['B']}, N={shape['N']}, H={shape['H']}, float32, "
    f"{where['cores']} cores of {where['processor']}, jax {where['versions']['jax']}, "
    f"{where['date'][:10]}"
  )


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], table: str, title: str) -> None:
  for name, style in STYLES.items():
    points = [(r["T"], _value(r, table)) for r in rows if r["contender"] == name]
    if points:
      lengths, values = zip(*sorted(points), strict=True)
      axes.plot(lengths, values, label=name, linewidth=1.8, markersize=4.5, **style)
  if table == "memory" and rows:
    sizes = sorted({(row["T"], row["qkvo"]) for row in rows})
    xs, ys = zip(*sizes, strict=True)
    axes.plot(xs, ys, label="q, k, v and the output", color=MUTED, linestyle=":", linewidth=1.2)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_title(title, loc="left", color=INK, fontsize=11)
  axes.set_xlabel("T, tokens", color=MUTED)
  axes.xaxis.set_major_formatter(FuncFormatter(length))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter(FuncFormatter(_bytes if table == "memory" else seconds))
  quiet(axes)


def _value(row: Mapping[str, Any], table: str) -> float:
  # A logarithm has no 0: memory that did not grow is drawn as one page.
  return max(row["growth"], 4096) if table == "memory" else row["median"]


def length(T: float, _: Any) -> str:
  """A number of tokens on an axis."""
  return f"{T / 1024:g}k" if T >= 1024 else f"{T:g}"


def seconds(value: float, _: Any) -> str:
  """A time on an axis."""
  for factor, unit in ((1, "s"), (1e-3, "ms")):
    if value >= factor:
      return f"{value / factor:g} {unit}"
  return f"{value * 1e6:g} µs"


def _bytes(value: float, _: Any) -> str:
  for factor, unit in ((1e9, "GB"), (1e6, "MB")):
    if value >= factor:
      return f"{value / factor:g} {unit}"
  return f"{value / 1e3:g} kB"
