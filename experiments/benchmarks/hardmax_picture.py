"""Time of hard-max attention on a chip against length, a panel per pass: from its results."""

from collections.abc import Mapping
from typing import Any, Final

from experiments.benchmarks import picture
from experiments.benchmarks.picture import INK, MUTED

COLORS: Final[Mapping[str, str]] = {
  "hopper": "#1f5fb4",
  "bulk": "#c05a00",
  "tiled": "#697386",
  "reference": "#9c86b8",
}
LINES: Final[Mapping[str, str]] = {"planar": "-", "wide": "--"}
KINDS: Final = ("forward", "backward")


def draw(results: Mapping[str, Any]) -> bytes:
  """The page, as PNG bytes."""
  figure = picture.page(10, 4.2)
  for panel, kind in zip(figure.subplots(1, 2), KINDS, strict=True):
    rows = [row for row in results["times"] if row["kind"] == kind]
    for who, width in dict.fromkeys((row["contender"], row["H"]) for row in rows):
      mine = [row for row in rows if (row["contender"], row["H"]) == (who, width)]
      points = sorted((row["T"], row["median"]) for row in mine)
      style = LINES["planar" if width == 2 else "wide"]
      name = f"{who}, width {width}"
      panel.plot(*zip(*points, strict=True), style, marker="o", color=COLORS[who], label=name)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_title(kind, loc="left", color=INK, fontsize=10)
    panel.set_xlabel("T, tokens", color=MUTED)
    panel.yaxis.set_major_formatter(picture.seconds)
    panel.legend(frameon=False, fontsize=7, labelcolor=INK)
    picture.quiet(panel)
  figure.suptitle(picture.chip_title("Hard-max attention", results), color=INK, fontsize=10)
  return picture.png(figure)
