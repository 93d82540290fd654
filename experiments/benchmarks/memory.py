"""The peak memory of one call, in a process where nothing else has run.

    python -m experiments.benchmarks.memory SUITE CONTENDER KIND T

prints a JSON object: `growth`, by how much the first call raised the resident memory over what
inputs and compiled program held, outputs included; and what the compiler says it needs,
`temporaries` and `outputs`. All in bytes. No call adds less than its outputs: where memory that
was freed before is used again, nothing was measured.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax

from experiments.benchmarks import contenders, resident
from experiments.benchmarks.suites import SUITES

ENVIRONMENT: Final[Mapping[str, str]] = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
"""Of every process that is measured: what is freed goes back at once. Otherwise glibc raises the
size from which it does so, and keeps in its arenas what `malloc_trim` does not find.
"""
TRIES = 3


def measure(suite: str, name: str, kind: str, T: int) -> dict[str, Any]:
  """Runs `main` in a fresh process and returns what it prints."""
  command = [sys.executable, "-m", __name__, suite, name, kind, str(T)]

  def once() -> dict[str, Any]:
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(
      command, cwd=contenders.ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
      raise RuntimeError(f"{name}, {kind}, T={T}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)

  return believable(once)


def measure_torch(python: str, suite: str, kind: str, T: int) -> dict[str, Any]:
  """The same of a fresh worker."""

  def once() -> dict[str, Any]:
    with contenders.Torch(python, environment=ENVIRONMENT) as torch:
      torch.load(SUITES[suite], T)
      return torch.ask("memory", kind=kind)

  return believable(once)


def believable(once: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """The first of a few measurements whose growth holds the outputs; RuntimeError if none does."""
  found: dict[str, Any] = {}
  for _ in range(TRIES):
    found = once()
    if found["growth"] >= found["outputs"]:
      return found
  raise RuntimeError(
    f"memory grew by {found['growth']} bytes in the last of {TRIES} tries, and the outputs alone "
    f"have {found['outputs']}"
  )


def main(suite_name: str, name: str, kind: str, length: str) -> None:
  """Measures this process and prints."""
  suite, T = SUITES[suite_name], int(length)
  jax.config.update("jax_platforms", "cpu")
  contender = contenders.make(name)
  arguments = [*contenders.arguments(suite, T), contenders.inputs(contender, suite, T)]
  compiled = jax.jit(contenders.program(contender, kind)).lower(*arguments).compile()
  says = compiled.memory_analysis()
  assert says is not None, "the compiler for CPUs tells what it needs"
  jax.block_until_ready(arguments)
  zero = resident.start()
  kept = jax.block_until_ready(compiled(*arguments))
  growth = resident.growth(zero)
  del kept
  print(
    json.dumps(
      {
        "growth": growth,
        "temporaries": says.temp_size_in_bytes,
        "outputs": says.output_size_in_bytes,
      }
    )
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
