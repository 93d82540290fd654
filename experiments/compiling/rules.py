"""What must be true of every row of ours, and what each figure of a row is called."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from experiments.compiling.shapes import SHAPES, STEP
from pallas_kernels import aot

Row = Mapping[str, Any]

# Compiler warnings that may stay: pattern -> why it does no harm.
EXPLAINED: Final[Mapping[str, str]] = {}
# Predicted times that differ by less are one: how often the grid's own code runs is approximate.
SAME: Final = 1.01


def key(row: Row) -> tuple[str, str, str]:
  """What rows are compared by."""
  return row["chip"], row["shape"], row["kind"]


def label(row: Row) -> str:
  """How a row is called."""
  return f"{row['program']}, {row['kind']}, {row['shape']}, {row['chip']}"


def broken(rows: Sequence[Row], rivals: Sequence[Row] = ()) -> list[str]:
  """A sentence for each rule that a row of ours breaks.

  Args:
    rows: what was compiled. Peers only set the time to beat.
    rivals: rows of another run, whose peers do the same.
  """
  every = [*rows, *rivals]
  return [f"{label(row)}: {why}" for row in rows if row["ours"] for why in _wrong(row, every)]


def _wrong(row: Row, rows: Sequence[Row]) -> Iterable[str]:
  if not row["ok"]:
    yield row["error"]
    return
  chip = aot.CHIPS[row["chip"]]
  # Matrix instructions mark the code that a visit runs, so without them no time is predicted.
  multiplies = SHAPES[row["shape"]].mechanism != "hardmax"
  if not multiplies and not row["kernels"]:
    yield "it has no kernel"
  matrix = any(k["matrix_instructions"] for k in row["kernels"])
  if multiplies and row["kind"] != STEP and not matrix:
    yield "it has no matrix instruction"
  for kernel in row["kernels"]:
    memory = kernel["shared_memory" if chip.platform == "cuda" else "vmem"]
    if memory > chip.fast_memory:
      yield f"{kernel['name']} takes {memory} bytes of {chip.fast_memory} of fast memory"
    if chip.platform == "cuda":
      yield from _wrong_on_hopper(kernel)
  if multiplies and chip.platform == "tpu":
    yield from _slower(row, rows)


def _wrong_on_hopper(kernel: Row) -> Iterable[str]:
  """On a TPU a spill is an instruction like any other, and its bundles are in the time."""
  if spilled := kernel["spill_stores"] + kernel["spill_loads"]:
    yield f"{kernel['name']} spills {spilled} bytes of registers"
  for warning in kernel["warnings"]:
    if not any(re.search(pattern, warning) for pattern in EXPLAINED):
      yield f"{kernel['name']}: {warning}"


def _slower(row: Row, rows: Sequence[Row]) -> Iterable[str]:
  if row["predicted"] is None:
    yield "no time can be predicted from its schedule"
    return
  best = best_peer(row, rows)
  if best is not None and row["predicted"] > SAME * best["predicted"]:
    yield (
      f"predicted {row['predicted'] * 1e3:.3f} ms, but {best['program']} "
      f"{best['predicted'] * 1e3:.3f} ms"
    )


def best_peer(row: Row, rows: Sequence[Row]) -> Row | None:
  """The peer with the least predicted time at the same chip, shape and pass."""
  peers = [r for r in rows if not r["ours"] and key(r) == key(row) and r.get("predicted")]
  return min(peers, key=lambda peer: peer["predicted"], default=None)


def best_setting(tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """Of one program's settings: the least predicted time, else the first that compiles, else all
  fail and the last error is the most telling.
  """
  good = [result for result in tried if result["ok"]]
  if not good:
    return tried[-1]
  return min(good, key=lambda result: result.get("predicted") or math.inf)
