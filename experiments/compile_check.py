"""Compiles every attention kernel, ours and our peers', for chips that are not here, and tells what
their compilers say: does it compile, does it fit, does it spill, how many cycles does a step take.

    python -m experiments.compile_check --chips=h200,v5e --shapes=7b_4k --check

Needs `pip install 'frugal-attention[aot]'` and no accelerator. Each pass of each program at each
shape is compiled in a process of its own; a compiler that crashes is a row that says so. Results go
to experiments/results/compile_check.json. A predicted time is the bundles of a TPU kernel's loops,
times how often they run, over the clock: it knows neither stalls nor copies, so it is a bound.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import files, flags, provenance
from experiments.compiling import rules, worker
from experiments.compiling.programs import PROGRAMS
from experiments.compiling.shapes import BACKWARD, FORWARD, SHAPES, STEP
from experiments.flags import UserError, knob
from pallas_kernels import aot

RESULTS = pathlib.Path(__file__).parent / "results" / "compile_check.json"
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "tokamax")
EVERY, OURS = "all", "ours"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The command line."""

  kernels: str = knob(EVERY, "Mechanisms or programs, with commas: flash, linear, ours...")
  chips: str = knob(EVERY, f"Chips, with commas: {', '.join(aot.CHIPS)}.")
  shapes: str = knob(EVERY, f"Shapes, with commas: {', '.join(SHAPES)}.")
  passes: str = knob(EVERY, "forward, backward, step, with commas.")
  jobs: int = knob(0, "Processes at once; 0 is one per core.", "[0, 1024]")
  timeout: float = knob(600.0, "Seconds after which a compiler is given up.", "(0, 86400]")
  check: bool = knob(False, "Exit 1, naming each row of ours that breaks a rule.")
  against: str = knob("", "Results whose peers set the time to beat, too; empty is the committed.")
  out: str = knob("", "Results, JSON; empty is experiments/results/compile_check.json.")
  add: bool = knob(False, "Keep the rows of --out that are not compiled anew.")
  compile: bool = knob(True, "False prints and judges what --out holds.")


def say(text: str) -> None:
  """Progress, for whoever waits."""
  print(text, file=sys.stderr, flush=True)


def chosen(flag: str, text: str, known: Sequence[str]) -> list[str]:
  """The names in a list with commas."""
  if text == EVERY:
    return list(known)
  names = [name.strip() for name in text.split(",") if name.strip()]
  for name in names:
    if name not in known:
      raise UserError(flags.unknown(flag, name, known))
  if not names:
    raise UserError(f"{flag} names nothing: there are {', '.join(known)}")
  return names


def programs(text: str) -> list[str]:
  """The programs that --kernels names: by name, by mechanism, or as ours."""
  mechanisms = list(dict.fromkeys(program.mechanism for program in PROGRAMS.values()))
  wanted = chosen("--kernels", text, [OURS, *mechanisms, *PROGRAMS])
  return [
    name
    for name, program in PROGRAMS.items()
    if {name, program.mechanism, OURS if program.ours else name} & set(wanted)
  ]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
  """What is compiled, and what cannot be."""

  jobs: list[worker.Job]
  absent: dict[str, str]
  """A chip or a program -> what has to be installed for it."""


def plan(options: Options) -> Plan:
  """The jobs that a command line asks for."""
  chips = chosen("--chips", options.chips, list(aot.CHIPS))
  shapes = chosen("--shapes", options.shapes, list(SHAPES))
  passes = chosen("--passes", options.passes, [FORWARD, BACKWARD, STEP])
  names = programs(options.kernels)
  absent = {chip: why for chip in chips if (why := aot.missing(aot.CHIPS[chip]))}
  absent |= {name: why for name in names if (why := PROGRAMS[name].absent)}
  jobs = [
    worker.Job(chip, name, kind, shape, setting)
    for chip, shape, kind, name in itertools.product(chips, shapes, passes, names)
    if not {chip, name} & set(absent) and PROGRAMS[name].platform == aot.CHIPS[chip].platform
    if PROGRAMS[name].mechanism == SHAPES[shape].mechanism
    if PROGRAMS[name].widest >= SHAPES[shape].H
    for setting in range(len(PROGRAMS[name].settings.get(kind, ())))
  ]
  if not jobs and not absent:
    what = f"--chips={options.chips} --shapes={options.shapes} --passes={options.passes}"
    raise UserError(f"--kernels={options.kernels} has nothing for {what}")
  return Plan(jobs, absent)


def compile_all(jobs: Sequence[worker.Job], processes: int, timeout: float) -> list[dict[str, Any]]:
  """A row per chip, shape, pass and program: the best of its settings."""
  start, tried = time.monotonic(), {}
  with concurrent.futures.ThreadPoolExecutor(processes) as pool:
    waiting = {pool.submit(worker.run, job, timeout): job for job in jobs}
    for done in concurrent.futures.as_completed(waiting):
      tried[waiting[done]] = done.result()
      said = "" if done.result()["ok"] else f": {done.result()['error']}"
      job = waiting[done]
      say(
        f"{len(tried)}/{len(jobs)}, {time.monotonic() - start:.0f} s: {job.program}, {job.kind}, "
        f"{job.shape}, {job.chip}{said}"
      )
  rows = []
  for job in jobs:
    if job.setting == 0:
      many = range(len(PROGRAMS[job.program].settings[job.kind]))
      results = [tried[dataclasses.replace(job, setting=setting)] for setting in many]
      what = {name: getattr(job, name) for name in ("chip", "shape", "kind", "program")}
      rows.append(
        what | {"ours": PROGRAMS[job.program].ours, "tried": len(results)}
        | dict(rules.best_setting(results))
      )  # fmt: skip
  return rows


def merged(
  kept: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
  """Rows of several runs, the newest of each, in the order of a run of everything."""
  rows = {(*rules.key(row), row["program"]): row for row in (*kept, *made)}
  orders = (list(aot.CHIPS), list(SHAPES), [FORWARD, BACKWARD, STEP], list(PROGRAMS))
  place = lambda what: [order.index(name) for order, name in zip(orders, what, strict=True)]
  return [rows[what] for what in sorted(rows, key=place)]


def environment(before: Mapping[str, str | None]) -> dict[str, Any]:
  """With what the rows were made: what is not here now has the version that earlier rows had."""
  told = provenance.environment(PACKAGES)
  versions = told["versions"] | {"ptxas": _ptxas()}
  return told | {"versions": {name: now or before.get(name) for name, now in versions.items()}}


def _ptxas() -> str | None:
  """The assembler's own word: `Cuda compilation tools, release 13.0, V13.0.88`."""
  if (tool := aot.find_tool("ptxas")) is None:
    return None
  said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
  match = re.search(r"\bV(\d[\d.]*)", said)
  return match[1] if match else None


def tables(results: Mapping[str, Any]) -> str:
  """What Hopper's compiler says, and what the TPUs' says, a line per row."""
  parts = []
  for platform, head, cells in (("cuda", HOPPER, _hopper_cells), ("tpu", TPU, _tpu_cells)):
    rows = [row for row in results["rows"] if aot.CHIPS[row["chip"]].platform == platform]
    if rows:
      parts.append(_aligned([head, *([*_names(row), *cells(row)] for row in rows)]))
  parts += [f"{what} was not compiled: {why}" for what, why in results["absent"].items()]
  return "\n\n".join(parts)


NAMES = ("chip", "shape", "pass", "program", "seconds")
HOPPER = (*NAMES, "registers", "spills", "shared", "barriers", "setmaxnreg", "HGMMA", "warnings")
TPU = (*NAMES, "VMEM KiB", "loop", "visit", "matrix", "vector", "spills", "predicted", "of bound")


def _names(row: Mapping[str, Any]) -> list[str]:
  seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
  return [row["chip"], row["shape"], row["kind"], row["program"], seconds]


def _each(row: Mapping[str, Any], show: Any) -> str:
  """A figure of each kernel of a pass: `1263+1500`."""
  return "+".join(str(show(kernel)) for kernel in row["kernels"])


def _hopper_cells(row: Mapping[str, Any]) -> list[str]:
  if not row["ok"]:
    return [row["error"]]
  return [
    _each(row, lambda k: k["registers"]),
    _each(row, lambda k: k["spill_stores"] + k["spill_loads"]),
    _each(row, lambda k: k["shared_memory"]),
    _each(row, lambda k: k["barriers"]),
    _each(row, lambda k: "yes" if k["setmaxnreg"] else "no"),
    _each(row, lambda k: k["matrix_instructions"]),
    "; ".join(warning for k in row["kernels"] for warning in k["warnings"]) or "none",
  ]


def _tpu_cells(row: Mapping[str, Any]) -> list[str]:
  if not row["ok"]:
    return [row["error"]]
  predicted, share = row["predicted"], row["share"]
  if not row["kernels"]:
    estimated, held = row.get("estimated"), row.get("temporary", 0) / 2**20
    time = "no time" if estimated is None else f"{estimated * 1e3:.3f} ms"
    return [f"no kernel; XLA's own estimate {time}, temporary {held:.0f} MiB"]
  return [
    _each(row, lambda k: k["vmem"] >> 10),
    _each(row, lambda k: k["loop"]),
    _each(row, lambda k: "/".join(map(str, sorted(k["hot"])))),
    _each(row, lambda k: f"{k['matrix_busy']:.0%}"),
    _each(row, lambda k: f"{k['vector_filled']:.0%}"),
    _each(row, lambda k: k["spill_stores"] + k["spill_loads"]),
    "unknown" if predicted is None else f"{predicted * 1e3:.3f} ms",
    "" if share is None else f"{share:.1%}",
  ]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
  """Columns as wide as they need; an error runs over the columns that it replaces."""
  full = [line for line in lines if len(line) == len(lines[0])]
  common = [max(len(line[i]) for line in lines) for i in range(len(NAMES))]
  widths = [*common, *(max(len(line[i]) for line in full) for i in range(len(NAMES), len(full[0])))]
  padded = (
    "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False))
    for line in lines
  )
  return "\n".join(text.rstrip() for text in padded)


def main(argv: Sequence[str]) -> int:
  """Compiles, writes, prints; returns 1 when asked to check and a rule is broken."""
  options = flags.parse(argv, Options(), doc=__doc__ or "")
  with flags.blame_user():
    flags.check_bounds(options)
  path = pathlib.Path(options.out or RESULTS)
  rivals = _read(pathlib.Path(options.against or RESULTS))["rows"]  # before it is written anew
  if options.compile:
    provenance.prepare(path)
    asked = plan(options)
    if not asked.jobs:
      raise UserError("; ".join(f"{what}: {why}" for what, why in asked.absent.items()))
    processes = options.jobs or len(os.sched_getaffinity(0))
    kept = _read(path) if options.add and path.exists() else {"environment": {}, "rows": []}
    rows = merged(kept["rows"], compile_all(asked.jobs, processes, options.timeout))
    results: dict[str, Any] = {
      "environment": environment(kept["environment"].get("versions", {})),
      "absent": asked.absent,
      "rows": rows,
    }
    files.write_results(path, results)
  else:
    results = _read(path)
  print(tables(results))
  wrong = rules.broken(results["rows"], rivals)
  absent = results["absent"].items()
  wrong += [f"nothing was compiled for {what}: {why}" for what, why in absent if what in aot.CHIPS]
  if options.check and wrong:
    print("\nbroken:", *wrong, sep="\n  ", file=sys.stderr)
    return 1
  return 0


def _read(path: pathlib.Path) -> dict[str, Any]:
  with flags.blame_user():
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
  flags.run_main(main)
