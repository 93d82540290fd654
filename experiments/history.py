"""What a run wrote, read back: the rows of `metrics.jsonl` with the configuration and the data card
beside them.

The reader forgives what a killed process leaves behind: a torn line, missing files, kinds that
never came, values that are null or not finite. It does not forgive silently: what could not be read
is counted.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import metrics
from experiments.figures import Line, Series

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
  """What a workdir says about its run. Each list is in order of step."""

  workdir: str
  train: Sequence[Row]
  valid: Sequence[Row]
  samples: Sequence[Row]
  events: Sequence[Row]
  starts: Sequence[Row]
  baselines: Mapping[str, float]
  config: Mapping[str, Any]
  card: Mapping[str, Any]
  seconds: float
  unreadable: int

  @property
  def start(self) -> Row:
    """What the last start of the run recorded: its environment and its size."""
    return self.starts[-1] if self.starts else {}

  @property
  def in_bits(self) -> bool:
    """Whether quality is told in bits or in nats: as the start row says, else as measured."""
    said = self.start.get("bits")
    if isinstance(said, bool):
      return said
    return any(finite(row, "bits") is not None for row in (*self.train, *self.valid))

  @property
  def noun(self) -> str:
    """What the model predicts one after the other: bytes of a text, or tokens of a made-up task."""
    return "byte" if self.config.get("task", "bytes") == "bytes" else "token"

  @property
  def unit(self) -> str:
    """The unit of `quality`."""
    return f"{'bits' if self.in_bits else 'nats'} per {self.noun}"

  @property
  def steps(self) -> int:
    """The last step that left a trace; of what happened, only since the last start."""
    began = finite(self.start, "time") or 0.0
    events = [row for row in self.events if (finite(row, "time") or 0.0) >= began]
    traces = (*self.train, *self.valid, *self.starts[-1:], *events)
    return max((step(row) for row in traces), default=0)

  def quality(self, row: Row) -> float:
    """The loss of a row in `unit`; NaN where the row has none."""
    bits, loss = finite(row, "bits"), finite(row, "loss")
    if not self.in_bits:
      return math.nan if loss is None else loss
    if bits is not None:
      return bits
    return math.nan if loss is None else loss / math.log(2)

  def series(self, rows: Sequence[Row], key: str = "") -> Series:
    """A column of rows against the step; the quality where no key is given."""
    values = [self.quality(row) if not key else finite(row, key) for row in rows]
    return Series([step(row) for row in rows], [math.nan if v is None else v for v in values])

  @property
  def final(self) -> tuple[str, int, float] | None:
    """What the run is judged by: (split, step, quality), of the last validation if there is one."""
    for split, rows in (("validation", self.valid), ("training", self.train)):
      series = self.series(rows)
      if series.steps.size:
        return split, int(series.steps[-1]), float(series.values[-1])
    return None

  @property
  def optimum(self) -> float | None:
    """The best loss that any model could have, in `unit`, where it is known."""
    value = finite(self.card, "optimum")
    value = finite(self.start, "optimum") if value is None else value
    return value / math.log(2) if value is not None and self.in_bits else value

  @property
  def lines(self) -> list[Line]:
    """What to compare with, in `unit`: baselines, which are kept in bits, and the optimum."""
    scale = 1.0 if self.in_bits else math.log(2)
    lines = [Line(name, value * scale) for name, value in self.baselines.items()]
    if self.optimum is not None:
      lines.append(Line("optimum", self.optimum, is_optimum=True))
    return lines


def finite(row: Row, key: str) -> float | None:
  """A number of a row, or None where it is absent, null, not finite or no number."""
  value = row.get(key)
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    return None
  return float(value)


def step(row: Row) -> int:
  """The step of a row; 0 where it has none."""
  return int(finite(row, "step") or 0)


def read(workdir: str | os.PathLike[str]) -> Run:
  """Reads a workdir.

  Raises:
    ValueError: if it holds no metrics.jsonl.
  """
  folder = pathlib.Path(workdir)
  path = folder / metrics.FILE
  if not path.is_file():
    raise ValueError(f"--workdir={folder} holds no metrics.jsonl: no run has started there")
  rows, unreadable = metrics.rows(path)
  kinds = _by_kind(rows)
  card = _object(folder / "data_card.json")
  measured = [card, *kinds["start"], *({"baselines": row} for row in kinds["baselines"])]
  return Run(
    workdir=os.fspath(workdir),
    train=_latest(kinds["train"]),
    valid=_latest(kinds["valid"]),
    samples=_latest(kinds["sample"]),
    events=kinds["event"],
    starts=kinds["start"],
    baselines=_baselines(measured),
    config=_object(folder / "config.json"),
    card=card,
    seconds=_seconds(rows),
    unreadable=unreadable,
  )


def _baselines(sources: Iterable[Row]) -> dict[str, float]:
  """Every number that a source holds under `baselines`; a later source wins."""
  found: dict[str, float] = {}
  for source in sources:
    baselines = source.get("baselines")
    if not isinstance(baselines, dict):
      continue
    for name in baselines:
      value = finite(baselines, name)
      if value is not None and name not in ("step", "time"):
        found[name] = value
  return found


def _by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """Rows by kind; a resumed run forgets what it had measured beyond its checkpoint."""
  kinds: dict[str, list[Row]] = collections.defaultdict(list)
  for row in rows:
    kind = str(row.get("kind"))
    resumed = finite(row, "resumed_from")
    if kind == "start":
      for name in ("train", "valid", "sample"):
        kinds[name] = [old for old in kinds[name] if step(old) <= (resumed or 0)]
    kinds[kind].append(row)
  return kinds


def _latest(rows: Sequence[Row]) -> list[Row]:
  """One row a step, the last that was written, in order of step."""
  by_step = {step(row): row for row in rows}
  return [by_step[key] for key in sorted(by_step)]


def _seconds(rows: Sequence[Row]) -> float:
  """Time spent training: from each start to the last row before the next, of the run's own."""
  lives: list[list[float]] = [[]]
  for row in rows:
    if row.get("kind") == "start":
      lives.append([])
    time = finite(row, "time")
    if time is not None and row.get("kind") != "evaluation":  # that is another program's
      lives[-1].append(time)
  return sum(max(times) - min(times) for times in lives if times)


def _object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file; empty where there is none or it cannot be read."""
  try:
    value = json.loads(path.read_text("utf-8"))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}
