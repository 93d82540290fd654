"""What a run measured, as JSON lines; TensorBoard when asked.

`metrics.jsonl` is the one source of curves and reports. A row is {"kind": ..., "step": updates
done, "time": unix seconds, ...}; its kind is start, train, valid, evaluation, sample or event.
"""

import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, Self, TextIO

from experiments import files
from experiments.flags import blame_user

FILE = "metrics.jsonl"
SAMPLES = "samples.jsonl"
"""What the model wrote along the way; a row is {"step": ..., "prompt": ..., "text": ...}."""


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a run, without what a kill or a full disk left unreadable."""
  path = pathlib.Path(workdir) / FILE
  return rows(path)[0] if path.exists() else []


def rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """The rows of a JSON-lines file, and how many of its lines a crash left unreadable."""
  found = [_row(line) for line in path.read_bytes().split(b"\n")]
  return [row for row in found if row], found.count(None)


def _row(line: bytes) -> dict[str, Any] | None:
  """The row of a line: {} where it holds none, None where it cannot be read."""
  try:
    row = json.loads(line) if line.strip() else None
  except ValueError:
    return None
  return row if isinstance(row, dict) else {}


def rewind(workdir: str | pathlib.Path, step: int, *, tell: Callable[[str], None] = print) -> int:
  """Drops the rows after `step`, which will be measured again; returns how many. Atomic.

  Drops a last line that is cut short too. `tell` is told of other lines that cannot be read; they
  stay.
  """
  dropped = 0
  for path in (pathlib.Path(workdir) / name for name in (FILE, SAMPLES)):
    if not path.exists():
      continue
    lines = path.read_bytes().split(b"\n")[:-1]
    found = [_row(line) for line in lines]
    later = [row is not None and (row.get("step") or 0) > step for row in found]
    kept = [line for line, gone in zip(lines, later, strict=True) if not gone]
    files.replace(path, b"".join(line + b"\n" for line in kept))
    dropped += sum(later)
    if unreadable := found.count(None):
      tell(f"warning: lines of {path} that cannot be read and are passed over: {unreadable}")
  return dropped


class Metrics:
  """Appends rows to a run's metrics.jsonl, each flushed at once; silent where not `active`."""

  def __init__(
    self, workdir: str | pathlib.Path, *, tensorboard: bool = False, active: bool = True
  ):
    self._file = self._board = None
    if not active:
      return
    with blame_user():
      self._file = _append(pathlib.Path(workdir) / FILE)
    if tensorboard:
      from tensorboardX import SummaryWriter  # an extra: imported by those who ask for it

      self._board = SummaryWriter(str(workdir), flush_secs=10)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def write(self, kind: str, step: int, **values: Any) -> None:
    """Appends one row. Numbers that are not finite become null: JSON has no word for them."""
    if self._file is None:
      return
    row = {"kind": kind, "step": step, "time": time.time()} | _plain(values)
    with blame_user():
      self._file.write(json.dumps(row, allow_nan=False) + "\n")
      self._file.flush()
    if self._board is not None:
      for name, value in row.items():
        if isinstance(value, (int, float)) and name not in ("step", "time"):
          self._board.add_scalar(f"{kind}/{name}", value, step)

  def close(self) -> None:
    """Closes the files."""
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()


def _append(path: pathlib.Path) -> TextIO:
  """The file, open at its end; a last line that was cut short is ended, lest a row joins it."""
  whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
  file = path.open("a", encoding="utf-8")
  file.write("" if whole else "\n")
  return file


def _plain(value: Any) -> Any:
  """Arrays of one element as Python numbers, and what is not finite as None."""
  if isinstance(value, dict):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if hasattr(value, "item"):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
