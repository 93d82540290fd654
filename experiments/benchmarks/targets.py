"""What the numbers of a suite must reach (`targets.json`), and whether they do.

A target asks for one number: the `ratio` of two rows' median times, the `exponent` of time in T
over all lengths of a contender, or the `memory` that a call adds, as a multiple of q, k, v and the
output together; on a chip also the `rate` of a row, as a multiple of the number that somebody has
`published`, if one is given. A row is written contender/kind/T, or on a chip
contender/kind/case. Where the first of a ratio is a list, it is the fastest of those that were
measured. A number that was not measured is not met.
"""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = Mapping[str, Any]


class Verdict(NamedTuple):
  """A target beside what was measured."""

  what: str
  bound: str
  measured: float | None
  rounds: tuple[float, float, float] | None
  """The lowest, median and highest ratio of a single round, where rounds can be compared."""
  verdict: str
  """"met", "missed" or "unmeasured"."""
  why: str = ""
  """What a number is missing for."""


def load(suite: str) -> list[dict[str, Any]]:
  """The targets of a suite."""
  text = pathlib.Path(__file__).with_name("targets.json").read_text(encoding="utf-8")
  return json.loads(text)[suite]


def key(row: Row) -> str:
  """How targets write a row."""
  return f"{row['contender']}/{row['kind']}/{row.get('case', row['T'])}"


def memory_of(row: str) -> str:
  """How `absent` writes that the memory of a row was not measured."""
  return f"memory of {row}"


def judge(target: Mapping[str, Any], results: Mapping[str, Any]) -> Verdict:
  """One target against the results of its suite."""
  bound = next(f"{name.replace('_', ' ')} {target[name]:g}" for name in _BOUNDS if name in target)
  try:
    measured, spread = _measure(target, results)
  except KeyError as missing:
    why = _why(str(missing.args[0]), target, results)
    return Verdict(target["what"], bound, None, None, "unmeasured", why)
  met = all(holds(measured, target[name]) for name, holds in _BOUNDS.items() if name in target)
  return Verdict(target["what"], bound, measured, spread, "met" if met else "missed")


def _why(row: str, target: Mapping[str, Any], results: Mapping[str, Any]) -> str:
  """Why there is no such row."""
  who, kind, case = [*row.split("/", 2), "", ""][:3]
  absent, refused = results["absent"], results.get("refused", {})
  reasons = [
    *(absent.get(name) for name in ("memory", memory_of(row)) if "memory" in target),
    absent.get(who),
    results.get("unmeasured", {}).get(case),
    *(refused.get(f"{who}/{one}/{case}") for one in kind.split("+")),
  ]
  return next((why for why in reasons if why), f"there is no row {row}")


RATES = ("tflops", "terabytes", "terapairs")
"""What is counted of a row on a chip, in a second and 1e12."""
_BOUNDS = {
  "at_least": lambda measured, bound: measured >= bound,
  "at_most": lambda measured, bound: measured <= bound,
}


def _measure(
  target: Mapping[str, Any], results: Mapping[str, Any]
) -> tuple[float, tuple[float, float, float] | None]:
  """The number, and the lowest, median and highest of its rounds; KeyError names a missing row."""
  times = {key(row): row for row in results["times"]}
  if "ratio" in target:
    over, under = _fastest(target["ratio"][0], times), times[target["ratio"][1]]
    rounds = [a / b for a, b in zip(over["seconds"], under["seconds"], strict=True)]
    return over["median"] / under["median"], (min(rounds), statistics.median(rounds), max(rounds))
  if "rate" in target:
    row, unit = times[target["rate"]], target.get("published", {}).get("tflops", 1.0)
    rate = next(row[name] for name in RATES if name in row)
    rates = [rate * row["median"] / seconds / unit for seconds in row["seconds"]]
    return rate / unit, (min(rates), statistics.median(rates), max(rates))
  if "exponent" in target:
    rows = [row for name, row in times.items() if name.rpartition("/")[0] == target["exponent"]]
    if len(rows) < 2:
      raise KeyError(target["exponent"])
    return exponent([row["T"] for row in rows], [row["median"] for row in rows]), None
  if "per_second" in target:
    row = times[target["per_second"]]
    rates = [1 / seconds for seconds in row["seconds"]]
    return 1 / row["median"], (min(rates), statistics.median(rates), max(rates))
  memory = {key(row): row for row in results["memory"]}
  row = memory[target["memory"]]
  return row["growth"] / row["qkvo"], None


def _fastest(names: str | Sequence[str], times: Mapping[str, Row]) -> Row:
  """The row of a name, or of several the one that took the least time."""
  if isinstance(names, str):
    return times[names]
  there = [times[name] for name in names if name in times]
  return min(there, key=lambda row: row["median"]) if there else times[names[0]]


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
  """The slope of log time over log length, by least squares."""
  return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def table(verdicts: Sequence[Verdict]) -> str:
  """A line per target: the verdict, the number, its bound, and the spread over rounds."""
  lines = []
  for v in verdicts:
    number = "-" if v.measured is None else f"{v.measured:.3g}"
    spread = ", ".join(f"{ratio:.3g}" for ratio in v.rounds or ())
    reason = f" ({v.why})" if v.why else ""
    lines.append(f"{v.verdict:<10}  {number:>8}  {v.bound:<14}  {spread:<22}  {v.what}{reason}")
  head = f"{'verdict':<10}  {'measured':>8}  {'asked':<14}  {'rounds: low, mid, high':<22}  what"
  return "\n".join([head, *lines])
