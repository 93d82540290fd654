"""How fast a run goes, how far it is, and what it tells the person who watches."""

import resource
import sys
import time
from contextlib import contextmanager
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def peak_memory() -> int:
  """Bytes at the highest so far: of the accelerator, where it says, else of this process."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"]
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


class Meter:
  """Counts training steps against the clock.

  Compiling, evaluating and sampling do not count into the rate of training; saving counts, and so
  does everything else that a step waits for. The time left is estimated from all of the time that
  has passed since the first step was done.
  """

  def __init__(self, clock=time.perf_counter):
    self._clock = clock
    self._began = self._last = clock()
    self._first = self._step = 0
    self._paused = 0.0

  def start(self, step: int) -> None:
    """Begins to measure, `step` being done."""
    self._began = self._last = self._clock()
    self._first = self._step = step
    self._paused = 0.0

  @contextmanager
  def pause(self):
    """Time inside this block is not training."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

  def lap(self, step: int) -> float | None:
    """Seconds per step since the last call; None if there was no step."""
    now = self._clock()
    steps, seconds = step - self._step, now - self._last - self._paused
    self._step, self._last, self._paused = step, now, 0.0
    return seconds / steps if steps > 0 else None

  def seconds_left(self, step: int, steps: int) -> float | None:
    """Until `steps` are done, at the pace so far; None before the pace is known."""
    done = step - self._first
    return (self._clock() - self._began) / done * (steps - step) if done > 0 else None


class Display:
  """A progress bar on a terminal, a line now and then elsewhere; silent where not `active`."""

  def __init__(self, steps: int, *, active: bool = True, every_seconds: float = 5.0):
    self._steps, self._active, self._every = steps, active, every_seconds
    self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    self._last = -every_seconds
    self._bar: Progress | None = None
    if active and self._console.is_terminal:
      self._bar = Progress(
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task("training", total=steps, text="compiling")

  def __enter__(self) -> Self:
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *error) -> None:
    if self._bar is not None:
      self._bar.stop()

  def tell(self, text: str) -> None:
    """Prints lines for people, above the bar."""
    if self._active:
      self._console.print(text, markup=False)

  def update(self, step: int, row: dict[str, Any]) -> None:
    """Shows a row of training."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step, text=describe(row))
    elif time.monotonic() - self._last >= self._every or step >= self._steps:
      self._last = time.monotonic()
      self.tell(f"step {step}/{self._steps}  {describe(row)}")


def describe(row: dict[str, Any]) -> str:
  """A row of training in a few words; what is not known is left out."""
  parts = [f"loss {row['loss']:.3f} ({row['bits']:.3f} bits)"]
  if row.get("tokens_per_second"):
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
  if row.get("mfu"):
    parts.append(f"MFU {100 * row['mfu']:.0f} %")
  parts.append(f"{row['memory_bytes'] / 1e9:.2f} GB")
  if row.get("seconds_left") is not None:
    parts.append(f"{duration(row['seconds_left'])} left")
  return "  ".join(parts)


def duration(seconds: float) -> str:
  """Seconds as 1:05:09 or 5:09."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
