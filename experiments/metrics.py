"""What a run measured, as JSON lines; TensorBoard when asked.

`metrics.jsonl` is the one source of curves and reports. A row is {"kind": ..., "step": updates
done, "time": unix seconds, ...}; its kind is start, train, valid, evaluation, sample or event.
"""

import json
import math
import pathlib
import time
from typing import Any, Self

from experiments import files
from experiments.flags import blame_user

FILE = "metrics.jsonl"


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a run. A last line that was cut short, by a kill or a full disk, is left out."""
  path = pathlib.Path(workdir) / FILE
  if not path.exists():
    return []
  return [json.loads(line) for line in _whole_lines(path.read_bytes())]


def _whole_lines(content: bytes) -> list[bytes]:
  return content[: content.rfind(b"\n") + 1].splitlines()


def rewind(workdir: str | pathlib.Path, step: int) -> int:
  """Drops the rows after `step`, which will be measured again; returns how many. Atomic."""
  path = pathlib.Path(workdir) / FILE
  if not path.exists():
    return 0
  lines = _whole_lines(path.read_bytes())
  kept = [line for line in lines if json.loads(line)["step"] <= step]
  files.replace(path, b"".join(line + b"\n" for line in kept))
  return len(lines) - len(kept)


class Metrics:
  """Appends rows to a run's metrics.jsonl, each flushed at once; silent where not `active`."""

  def __init__(
    self, workdir: str | pathlib.Path, *, tensorboard: bool = False, active: bool = True
  ):
    self._file = self._board = None
    if not active:
      return
    with blame_user():
      self._file = (pathlib.Path(workdir) / FILE).open("a", encoding="utf-8")
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
