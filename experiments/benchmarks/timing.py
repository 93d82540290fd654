"""Timing by turns: each contender once a round, so that what the machine does meets them all."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# A timer runs its contender so many times and returns the seconds per run.
Timer = Callable[[int], float]


class Times(NamedTuple):
  """Seconds per run, one number a round; each is the mean of `repeats` runs in a row."""

  seconds: list[float]
  repeats: int

  def row(self) -> dict[str, Any]:
    """What the results keep."""
    return {
      "median": statistics.median(self.seconds),
      "min": min(self.seconds),
      "rounds": len(self.seconds),
      "repeats": self.repeats,
      "seconds": self.seconds,
    }


def timer(function: Callable[..., Any], arguments: Sequence[Any]) -> Timer:
  """Times a jitted function, waiting for each result before the next run."""

  def run(repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
      jax.block_until_ready(function(*arguments))
    return (time.perf_counter() - start) / repeats

  return run


def queue_timer(function: Callable[..., Any], arguments: Sequence[Any]) -> Timer:
  """Times a jitted function on a chip that works through a queue: the runs are handed over one
  after the other and waited for once, so that handing over hides behind the work.
  """

  def run(repeats: int) -> float:
    start, last = time.perf_counter(), None
    for _ in range(repeats):
      last = function(*arguments)
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / repeats

  return run


def state_timer(
  step: Callable[..., tuple[Any, Any]], state: Any, token: Sequence[Any], room: int
) -> Timer:
  """Times a jitted step that hands its state on, and may donate what it is given. After `room`
  steps it begins anew from this state, and making the copy for that is not timed.
  """

  def run(repeats: int) -> float:
    seconds = 0.0
    for done in range(0, repeats, room):
      held = jax.block_until_ready(jax.tree.map(jnp.copy, state))
      start = time.perf_counter()
      for _ in range(min(room, repeats - done)):
        held, out = step(held, *token)
        jax.block_until_ready((held, out))
      seconds += time.perf_counter() - start
    return seconds / repeats

  return run


def added(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
  """The row of two programs that run one after the other, from rows of the same rounds."""
  both = zip(first["seconds"], second["seconds"], strict=True)
  repeats = min(first["repeats"], second["repeats"])
  return Times([a + b for a, b in both], repeats).row()


def interleave[Name](
  timers: Mapping[Name, Timer],
  rounds: int,
  *,
  least: float = 0.02,
  most_repeats: int = 200,
  settle: float = 0.0,
) -> dict[Name, Times]:
  """Warms each timer up, then times all of them once per round, every other round in reverse.

  Args: timers: what to run; the first run of each may compile. rounds: times that each is measured.
    least: seconds that one measurement should last; short runs are repeated within it.
    most_repeats: bound of those repetitions. settle: seconds of rest before each measurement, so
    that another's idle threads have gone to sleep.
  """
  repeats = {}
  for name, run in timers.items():
    run(1)
    repeats[name] = max(1, min(most_repeats, round(least / max(run(1), 1e-9))))
  seconds: dict[Name, list[float]] = {name: [] for name in timers}
  for index in range(rounds):
    for name in list(timers)[:: -1 if index % 2 else 1]:
      time.sleep(settle)
      seconds[name].append(timers[name](repeats[name]))
  return {name: Times(seconds[name], repeats[name]) for name in timers}
