"""Milliseconds of linear attention on a chip, a panel per kind of decay and pass: from results."""

from collections.abc import Mapping
from typing import Any, Final

from matplotlib.axes import Axes

from experiments.benchmarks import picture
from experiments.benchmarks.picture import INK, MUTED

OURS: Final = "#1f5fb4"
PEERS: Final[Mapping[str, str]] = {
  "fla": "#b0625a",
  "jax-linear-attention": "#c79a4b",
  "chunked": "#697386",
  "recurrence": "#5a8f8a",
  "torch recurrence": "#9c86b8",
}
KINDS: Final = ("forward", "forward+backward")


def draw(results: Mapping[str, Any]) -> bytes:
  """The page, as PNG bytes."""
  decays = list(dict.fromkeys(case["decay"] for case in results["cases"]))
  figure = picture.page(11.0, 3.4 * len(decays) + 0.8)
  grid = figure.subplots(len(decays), len(KINDS), squeeze=False)
  for line, decay in zip(grid, decays, strict=True):
    for panel, kind in zip(line, KINDS, strict=True):
      _bars(panel, results, decay, kind)
      title = f"{kind}, decays per {decay}"
      panel.set_title(title, loc="left", color=INK, fontsize=10)
  picture.legend(figure, figure.axes, (results["ours"], *PEERS))
  title = picture.chip_title("Linear attention", results)
  figure.suptitle(title, color=INK, fontsize=10)
  return picture.png(figure)


def _bars(axes: Axes, results: Mapping[str, Any], decay: str, kind: str) -> None:
  """A group for each shape."""
  cases = [case for case in results["cases"] if case["decay"] == decay]
  found = {(r["case"], r["contender"]): r["median"] for r in results["times"] if r["kind"] == kind}
  colors = {results["ours"]: OURS} | {k: v for k, v in PEERS.items() if k != results["ours"]}
  names = [name for name in colors if any(who == name for _, who in found)]
  width = 0.8 / max(1, len(names))
  for index, name in enumerate(names):
    places = [
      (i + (index + 0.5) * width - 0.4, 1e3 * found[case["case"], name])
      for i, case in enumerate(cases)
      if (case["case"], name) in found
    ]
    if places:
      xs, heights = zip(*places, strict=True)
      axes.bar(xs, heights, width, label=name, color=colors[name])
  labels = [f"{case['B']} x {case['T']}\n{case['N']} x {case['H']}" for case in cases]
  axes.set_xticks(range(len(cases)), labels, fontsize=7)
  axes.set_ylabel("ms", color=MUTED)
  picture.quiet(axes)
