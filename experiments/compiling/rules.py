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
# A warning that says no more than the number of bytes does.
SPILLED: Final = r"Registers are spilled to local memory"
# Bytes that a thread of a kernel for Hopper may spill, stores and loads, at heads so wide, at most.
# 64 columns of a state of 256 rows are 128 of a thread's 240 registers, and the products that add
# to it need the rest. Why unfading spills was not found. No chip has told what any of it costs.
SPILLS: Final[Mapping[tuple[str, int], int]] = {
  ("linear_forward", 256): 400,
  ("linear_gradients", 256): 2400,
  ("linear_gradients", 128): 24,
  ("linear_unfade", 128): 208,
  ("linear_unfade", 256): 208,
}
# The same of float32, whose every product is six, at heads of 128.
SPILLS_FLOAT32: Final[Mapping[str, int]] = {
  "linear_fade": 400,
  "linear_forward": 1600,
  "linear_gradients": 5200,
  "linear_unfade": 2000,
}
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
      yield from _wrong_on_hopper(kernel, row)
  if multiplies and chip.platform == "tpu":
    yield from _slower(row, rows)


def _wrong_on_hopper(kernel: Row, row: Row) -> Iterable[str]:
  """On a TPU a spill is an instruction like any other, and its bundles are in the time."""
  bare, width = re.sub(r"_\d+$", "", kernel["name"]), SHAPES[row["shape"]].H
  spilled = kernel["spill_stores"] + kernel["spill_loads"]
  narrow = SPILLS.get((bare, width), 0)
  if spilled > (SPILLS_FLOAT32.get(bare, 0) if "float32" in row["program"] else narrow):
    yield f"{kernel['name']} spills {spilled} bytes of registers"
  for warning in kernel["warnings"]:
    if not re.search(SPILLED, warning) and not any(
      re.search(pattern, warning) for pattern in EXPLAINED
    ):
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
