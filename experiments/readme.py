"""Keeps README.md true: this program writes its tables and pictures, from VARIANTS and results.

    python -m experiments.readme

rewrites what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, and nothing else. A
number that no program measured has no way into the page: without `experiments/results/cpu.json` it
says that nothing was measured, and without `h200_softmax.json`, `h200_linear.json` or an h100's
there that no such chip was at hand.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attention import variants
from experiments import flags
from experiments.report import size

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = pathlib.PurePosixPath("experiments/results")

# The columns of the table of numbers: title, which rows, and how long the input is.
COLUMNS: Sequence[tuple[str, str, str, int]] = (
  ("forward, 4k", "times", "forward", 4096),
  ("and backward, 4k", "times", "forward+backward", 4096),
  ("forward, 16k", "times", "forward", 16384),
  ("and backward, 16k", "times", "forward+backward", 16384),
  ("memory, 16k", "memory", "forward+backward", 16384),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The command line: there is nothing to choose."""


def mechanisms(root: pathlib.Path) -> str:
  """The table of VARIANTS."""
  del root
  return _table(("`--attention=`", "what it is", "cost", "source"), _quoted_first(variants.table()))


def picture(root: pathlib.Path) -> str:
  """The picture of the CPU's results, if they were measured."""
  if _results(root) is None:
    return ""
  alt = "Time and memory against sequence length, on logarithmic scales, ours beside its peers"
  return f"![{alt}]({RESULTS}/cpu.png)"


def curve(root: pathlib.Path) -> str:
  """The picture of a training run, if one was kept."""
  if not (root / RESULTS / "bytes.png").exists():
    return ""
  alt = "Bits per byte of a small model while it learns, falling below the bigram baseline"
  return f"![{alt}]({RESULTS}/bytes.png)"


def recall(root: pathlib.Path) -> str:
  """The picture of recall against the size of the state, if that was measured."""
  results = _results(root, "mqar")
  if results is None:
    return ""
  where, rows = results["environment"], results["rows"]
  lead = (
    f"{len(rows)} points of {len(rows[0]['accuracy'])} seeds each, jax {where['versions']['jax']}, "
    f"{where['date'][:10]}, commit {where['commit']}."
  )
  alt = "Share of right answers against bytes of state, a line for each mechanism"
  return f"![{alt}]({RESULTS}/mqar.png)\n\n{lead}"


def measured(root: pathlib.Path) -> str:
  """The table of numbers, and the targets beside what was reached."""
  results = _results(root)
  if results is None:
    return "Nothing was measured yet: `python -m experiments.benchmark --suite=cpu` does it."
  where, shape = results["environment"], results["shape"]
  lead = (
    f"Causal, B={shape['B']}, N={shape['N']}, H={shape['H']}, float32, {where['cores']} cores of "
    f"{where['processor']} with jax {where['versions']['jax']}, {where['date'][:10]}, commit "
    f"{where['commit']}; medians, by `{where['command']}`. Memory is what a call adds."
  )
  parts = [lead, _numbers(results), "Asked for, and reached:", _verdicts(results)]
  absent = [f"{name} was absent: {why}." for name, why in results["absent"].items()]
  return "\n\n".join(parts + absent)


def hardmax(root: pathlib.Path) -> str:
  """What was measured of hard-max heads: the targets and the picture; and the machine's picture."""
  results, machine = _results(root, "hull"), _results(root, "hull_machine")
  parts = []
  if results is not None:
    where = results["environment"]
    lead = (
      f"{where['cores']} cores of {where['processor']}, jax {where['versions']['jax']}, "
      f"{where['date'][:10]}, commit {where['commit']}; medians, by `{where['command']}`."
    )
    alt = "Time of a token against the number before it, hulls beside scans of all keys"
    parts += [f"![{alt}]({RESULTS}/hull.png)", lead, _verdicts(results)]
  if machine is not None:
    alt = "Tokens per second of the written machine against the length of its trace"
    parts.append(f"![{alt}]({RESULTS}/hull_machine.png)")
  return "\n\n".join(parts)


# Chips, by the names of their results.
CHIPS = ("h200", "h100")
PASSES = ("forward", "backward")
PENDING = (
  "GPU numbers pending: no such chip was at hand. On a machine with a Hopper GPU "
  "`python -m experiments.benchmark --suite=gpu --check` measures what fits into 8 minutes, and "
  "`--suite=gpu-linear` and `--suite=gpu-hardmax` the same of linear and of hard-max attention."
)


def chips(root: pathlib.Path) -> str:
  """What was measured on GPUs: a table, a picture and the targets of each, or that none was."""
  names = [f"{chip}_{what}" for what in ("softmax", "linear", "hardmax") for chip in CHIPS]
  found = [(name, _results(root, name)) for name in names]
  parts = [part for name, results in found if results for part in _chip(root, name, results)]
  return "\n\n".join(parts) or PENDING


def _chip(root: pathlib.Path, name: str, results: Mapping[str, Any]) -> list[str]:
  where, checked = results["environment"], results["checks"]
  softmax, what = name.endswith("_softmax"), name.rpartition("_")[2]
  counted = (
    "TFLOP/s at the longest T, forward / backward; of windows and documents only the pairs that "
    "may attend count."
  )
  lead = (
    f"{where['device']}, {results['dtype']}, jax {where['versions']['jax']}, {where['date'][:10]}, "
    f"commit {where['commit']}; checks {checked['verdict']} ({len(checked['rows'])} run); medians, "
    f"by `{where['command']}`. {counted if softmax else 'Milliseconds, forward / backward.'}"
  )
  parts = [lead, _rates(results) if softmax else _milliseconds(results)]
  if (root / RESULTS / f"{name}.png").exists():
    shown = "TFLOP/s against sequence length" if softmax else f"Time of {what} attention"
    alt = f"{shown} on {where['device']}, ours beside its peers"
    parts.append(f"![{alt}]({RESULTS}/{name}.png)")
  parts += ["Asked for, and reached:", _verdicts(results)]
  parts += [f"{name} was absent: {why}." for name, why in results["absent"].items()]
  if left := len(results["unmeasured"]):
    parts.append(f"{left} of {len(results['cases'])} cases were not measured.")
  return parts


def _rates(results: Mapping[str, Any]) -> str:
  """A line per case at the longest T, a column per contender."""
  longest = max(case["T"] for case in results["cases"])
  found = {(r["case"], r["contender"], r["kind"]): f"{r['tflops']:.0f}" for r in results["times"]}
  names = list(dict.fromkeys(row["contender"] for row in results["times"]))
  lines = []
  for case in (case for case in results["cases"] if longest == case["T"]):
    pairs = [[found.get((case["case"], n, kind), "-") for kind in PASSES] for n in names]
    if any(pair != ["-", "-"] for pair in pairs):
      cells = ("" if pair == ["-", "-"] else " / ".join(pair) for pair in pairs)
      lines.append([f"{case['mask']}, H={case['H']}", *cells])
  return _table([f"T={longest}", *names], lines, right=True)


def _milliseconds(results: Mapping[str, Any]) -> str:
  """A line per case, a column per contender."""
  times = {(r["case"], r["contender"], r["kind"]): r["median"] for r in results["times"]}
  names = list(dict.fromkeys(row["contender"] for row in results["times"]))
  lines = []
  for case in results["cases"]:
    pairs = [[times.get((case["case"], n, kind)) for kind in PASSES] for n in names]
    cells = (" / ".join("-" if x is None else f"{1e3 * x:.3g}" for x in pair) for pair in pairs)
    lines.append([case["case"], *cells])
  return _table(["case", *names], lines, right=True)


BLOCKS: Mapping[str, Callable[[pathlib.Path], str]] = {
  "picture": picture,
  "curve": curve,
  "mechanisms": mechanisms,
  "recall": recall,
  "measured": measured,
  "hard-max": hardmax,
  "chips": chips,
}


def rewrite(text: str, root: pathlib.Path = ROOT) -> str:
  """The page with every block made anew.

  Raises:
    ValueError: a block's markers are missing, or are there twice.
  """
  for name, block in BLOCKS.items():
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
      raise ValueError(f"README.md must hold {begin} and {end} once each, in this order")
    content = block(root)
    middle = f"\n{content}\n" if content else "\n"
    head, rest = text.split(begin)
    text = head + begin + middle + end + rest.split(end)[1]
  return text


def _results(root: pathlib.Path, name: str = "cpu") -> Mapping[str, Any] | None:
  path = root / RESULTS / f"{name}.json"
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _numbers(results: Mapping[str, Any]) -> str:
  found = {
    (table, row["contender"], row["kind"], row["T"]): row
    for table in ("times", "memory")
    for row in results[table]
  }
  names = dict.fromkeys(name for table, name, *_ in found if table == "times")
  lines = []
  for name in names:
    rows = [found.get((table, name, kind, T)) for _, table, kind, T in COLUMNS]
    if any(rows):
      lines.append([name, *(_cell(row) for row in rows)])
  titles = ["", *(title for title, *_ in COLUMNS)]
  return _table(titles, lines, right=True)


def _cell(row: Mapping[str, Any] | None) -> str:
  if row is None:
    return ""
  return size(row["growth"]) if "growth" in row else milliseconds(row["median"])


def milliseconds(seconds: float) -> str:
  """Three digits: `0.733` is `733 ms`, `2.169` is `2170 ms`."""
  value = seconds * 1e3
  return f"{value:.3g} ms" if value < 1000 else f"{round(value, -1):.0f} ms"


def _verdicts(results: Mapping[str, Any]) -> str:
  lines = []
  for row in results["targets"]:
    reached = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
    lines.append([row["what"], row["bound"], reached, row["verdict"]])
  return _table(("target", "asked", "reached", ""), lines)


def _quoted_first(rows: Sequence[Sequence[str]]) -> list[list[str]]:
  return [[f"`{name}`", *rest] for name, *rest in rows]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> str:
  """A Markdown table; with `right`, every column but the first is aligned to the right."""
  rule = ["---", *(("---:" if right else "---") for _ in head[1:])]
  lines = [head, rule, *([_escape(cell) for cell in row] for row in rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(cell: str) -> str:
  return re.sub(r"\s+", " ", cell).replace("|", "\\|")


def main(argv: Sequence[str]) -> None:
  """Rewrites README.md in place."""
  flags.parse(argv, Options(), doc=__doc__ or "")
  with flags.blame_user():
    README.write_text(rewrite(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
  flags.run_main(main)
