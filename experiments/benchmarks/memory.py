"""The peak memory of one call, in a process where nothing else has run.

    python -m experiments.benchmarks.memory SUITE CONTENDER KIND T

prints a JSON object: `growth`, by how much the first call raised the resident memory over what
inputs and compiled program held, outputs included; and what the compiler says it needs,
`temporaries` and `outputs`. All in bytes.
"""

import json
import subprocess
import sys
from typing import Any

import jax

from experiments.benchmarks import contenders, resident
from experiments.benchmarks.suites import SUITES


def measure(suite: str, name: str, kind: str, T: int) -> dict[str, Any]:
  """Runs `main` in a fresh process and returns what it prints."""
  command = [sys.executable, "-m", __name__, suite, name, kind, str(T)]
  done = subprocess.run(command, cwd=contenders.ROOT, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{name}, {kind}, T={T}: {done.stderr.strip().splitlines()[-1:]}")
  return json.loads(done.stdout)


def measure_torch(python: str, suite: str, kind: str, T: int) -> dict[str, Any]:
  """The same of a fresh worker."""
  with contenders.Torch(python) as torch:
    torch.load(SUITES[suite], T)
    return torch.ask("memory", kind=kind)


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
