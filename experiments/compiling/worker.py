"""Compiles one pass of one program for one chip, in this process, and writes what was found.

    python -m experiments.compiling.worker JOB DUMP RESULT

JOB is a JSON object with the fields of `Job`, DUMP an empty folder. The environment must
be what `pallas_kernels.aot.environment` says for that chip and folder. `run` sees to both.
"""

import ctypes
import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from experiments.compiling import estimates
from experiments.compiling.programs import PROGRAMS
from experiments.compiling.shapes import SHAPES, least
from experiments.compiling.work import Built
from pallas_kernels import aot, bundles

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Characters of a compiler's error that are kept.
LONGEST = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
  """What a worker compiles."""

  chip: str
  program: str
  kind: str
  shape: str
  setting: int
  """Which of the program's settings."""


def run(job: Job, timeout: float) -> dict[str, Any]:
  """Compiles in a fresh process; a process that dies is a result with an error, too."""
  with tempfile.TemporaryDirectory() as folder:
    dump, out = pathlib.Path(folder, "dump"), pathlib.Path(folder, "result.json")
    dump.mkdir()
    command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(job)), str(dump)]
    environment = os.environ | aot.environment(aot.CHIPS[job.chip], dump)
    try:
      done = subprocess.run(
        [*command, str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
      )
    except subprocess.TimeoutExpired:
      return _failed(f"it took longer than {timeout:.0f} s")
    if not out.exists():
      return _failed(_last_words(done.returncode, done.stderr))
    return json.loads(out.read_text(encoding="utf-8"))


def _failed(why: str) -> dict[str, Any]:
  return {"ok": False, "error": why, "seconds": None, "kernels": []}


def _last_words(code: int, said: str) -> str:
  """What a compiler that took its process with it may have said."""
  lines = [line.strip() for line in said.splitlines() if line.strip()]
  telling = [line for line in lines if re.search(r"error|check fail|fatal", line, re.IGNORECASE)]
  ended = f"signal {-code}" if code < 0 else f"exit code {code}"
  return shortened(f"the compiler's process ended with {ended}: {(telling or lines or ['-'])[-1]}")


def shortened(error: str) -> str:
  """The first line that says something, without this machine's folders."""
  lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
  line = re.sub(r"(/[\w.+-]+){2,}/", "", lines[0] if lines else "no message")
  return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def compile_job(job: Job, dump: str) -> dict[str, Any]:
  """Compiles in this process."""
  chip, shape = aot.CHIPS[job.chip], SHAPES[job.shape]
  program = PROGRAMS[job.program]
  settings = program.settings[job.kind][job.setting]
  start = time.monotonic()
  try:
    with aot.target(chip):  # blocks are as large as the chip wants them
      built = program.build(shape, job.kind, settings)
    compiled = aot.compile_for(chip, built.function, *built.arguments)
  except Exception as error:  # whatever a compiler or a peer raises is what is asked for
    return _failed(shortened(f"{type(error).__name__}: {error}")) | {"settings": dict(settings)}
  found: dict[str, Any] = {"ok": True, "error": None, "seconds": time.monotonic() - start}
  if chip.platform == "cuda":
    kernels = [kernel._asdict() for kernel in aot.read_hopper(dump)]
    found |= {"kernels": kernels}
  else:
    kernels = [] if built.whole else aot.read_tpu(dump, chip)
    found |= _on_tpu(chip, kernels, built)
    least_time, predicted = least(shape, job.kind, chip), found["predicted"]
    found["share"] = None if predicted is None else least_time / predicted
    if built.whole:
      found |= _by_xla(chip, compiled)
  return found | {"settings": dict(settings)}


def _by_xla(chip: aot.Chip, compiled: Any) -> dict[str, Any]:
  """XLA's own estimate of a program that is XLA's alone, and the bytes that it holds meanwhile."""
  cycles = estimates.cycles(compiled.as_text())
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return {"estimated": None if cycles is None else cycles / chip.clock, "temporary": temporary}


def _on_tpu(chip: aot.Chip, kernels: list[aot.TpuKernel], built: Built) -> dict[str, Any]:
  """The kernels that the pass consists of, and the time that their bundles take."""
  rows, total = [], 0.0
  for kernel in kernels:
    match = next((w for w in built.work if re.fullmatch(w.pattern, _bare(kernel.name))), None)
    if match is None and re.fullmatch(built.others, _bare(kernel.name)):
      continue
    row = tpu_row(kernel)
    cycles = bundles.cycles(kernel.schedule, match.trips) if match else None
    if cycles is None or match is None:
      row["seconds"], total = None, math.nan
    else:
      row["seconds"] = cycles / (chip.clock * (chip.cores if match.parallel else 1))
      total += row["seconds"]
    rows.append(row)
  known = bool(rows) and not math.isnan(total)
  return {"kernels": rows, "predicted": total if known else None}


def _bare(name: str) -> str:
  """A kernel's name without the number that XLA appends."""
  return re.sub(r"\.\d+$", "", name)


def tpu_row(kernel: aot.TpuKernel) -> dict[str, Any]:
  """The figures of one kernel; shares are those of the code that one visited block runs."""
  schedule = kernel.schedule
  hottest = max(bundles.hot(schedule), key=lambda node: node.bundles)
  return {
    "name": kernel.name,
    "program": schedule.root.bundles,
    "loop": bundles.hot_loop(schedule).bundles,
    "hot": [node.bundles for node in bundles.hot(schedule)],
    "matrix_busy": round(schedule.busy(hottest, "MXU"), 4),
    "vector_filled": round(schedule.filled(hottest, "VALU"), 4),
    "matrix_instructions": schedule.instructions(schedule.root, "MXU"),
    "spill_stores": schedule.instructions(hottest, "VSTORE:SPILL"),
    "spill_loads": schedule.instructions(hottest, "VLOAD:FILL"),
    "vmem": kernel.vmem,
    "vmem_spilled": kernel.spilled,
  }


def main(job: str, dump: str, out: str) -> None:
  """Compiles and writes."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with whoever asked
  found: Mapping[str, Any] = compile_job(Job(**json.loads(job)), dump)
  pathlib.Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
  main(*sys.argv[1:])
