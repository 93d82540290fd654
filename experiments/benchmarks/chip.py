"""A suite on a chip: checks first, then everybody by turns, until the time is up.

Results are handed on after every step, so that a run that is cut short leaves what it measured.
"""

import contextlib
import datetime
import gc
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from attention import chips
from experiments.benchmarks import (
  checks,
  chip_picture,
  hardmax_checks,
  hardmax_picture,
  hardmax_rivals,
  linear_checks,
  linear_picture,
  linear_rivals,
  rivals,
  timing,
)
from experiments.benchmarks.cases import CHIP_SUITES, AnyCase, ChipSuite, case_row
from experiments.benchmarks.contenders import BOTH, Torch
from experiments.benchmarks.rivals import Inputs, Ready
from experiments.flags import UserError

Progress = Callable[[str], None]
"""Told what begins, so that what does not end has a name and a time of its own."""
CHECKS_SHARE = 0.4  # of the time, at most
RESERVE = 20.0  # seconds of it, for what comes before and after the measuring
HANG = 240.0  # seconds without progress after which a kernel counts as one that never ends
_TIMES = (
  "Each number is the mean time of calls that are queued up on the chip and waited for once; calls "
  "are repeated so that one measurement lasts 20 ms or more. Contenders take turns, every other "
  "round in reverse, and medians over rounds are judged. Backward is the pulled-back call of "
  "jax.vjp alone, its residuals held on the device (torch: autograd.grad with the graph kept); "
  "forward+backward is the sum of the two, round by round. "
)


class Mechanism(NamedTuple):
  """How attention of one kind is checked, timed and shown."""

  rivals: Any
  """The module of its contenders."""
  check: Callable[..., dict[str, Any]]
  rate: str
  """The name of what `Case.rate` counts."""
  unit: str
  counted: str
  """What that is."""
  draw: Callable[[Mapping[str, Any]], bytes]


MECHANISMS = {
  "softmax": Mechanism(
    rivals,
    checks.run,
    "tflops",
    "TFLOP/s",
    "TFLOP/s count 2 B N T S (H + h) forward and 2.5 times that backward, half of it where causal, "
    "and of windows and documents only the pairs that may attend.",
    chip_picture.draw,
  ),
  "linear": Mechanism(
    linear_rivals,
    linear_checks.run,
    "terabytes",
    "TB/s",
    "Gradients are of q, k, v and the decays. TB/s count every input and output of a pass once, "
    "decays in float32, so that the chip's memory is what no pass exceeds.",
    linear_picture.draw,
  ),
  "hardmax": Mechanism(
    hardmax_rivals,
    hardmax_checks.run,
    "terapairs",
    "Tpairs/s",
    "Tpairs/s count every query with each key that it may read, whoever looks at them or not.",
    hardmax_picture.draw,
  ),
}


def mechanism(suite: ChipSuite) -> Mechanism:
  """That of a suite."""
  return MECHANISMS[suite.mechanism]


def prepare(name: str) -> str:
  """Chooses the platform of a suite before jax starts; returns the chip's name for files.

  Raises:
    UserError: what is missing on this machine.
  """
  suite = CHIP_SUITES[name]
  # torch needs memory beside us, and so does the process that checks.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if suite.device == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that we start
    jax.config.update("jax_platforms", "cpu")
    return "cpu"
  if reason := chips.not_hopper():
    raise UserError(
      f"--suite={name} cannot run here: {reason} (with one, pip install 'jax[cuda13]' lets jax "
      f"{jax.__version__} use it)"
    )
  return chip_name(chips.current().kind)


def chip_name(kind: str) -> str:
  """A Hopper GPU as files are named: h200 for NVIDIA H200."""
  found = re.search(r"H\d+", kind)
  return found.group().lower() if found else "gpu"


def measure(
  name: str,
  *,
  environment: Mapping[str, Any],
  torch_python: str,
  limit_s: float,
  say: Callable[[str], None],
  save: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
  """Runs a suite. `limit_s` is the time for all of it; what is left out is listed."""
  suite, start = CHIP_SUITES[name], time.monotonic()
  deadline = start + limit_s - RESERVE
  results: dict[str, Any] = {
    "suite": name,
    "environment": dict(environment) | chip_environment(),
    "method": _TIMES + mechanism(suite).counted,
    "mechanism": suite.mechanism,
    "ours": suite.ours,
    "dtype": suite.dtype,
    "cases": [case_row(case) for case in suite.cases],
    "absent": {},
    "refused": {},
    "errors": {},
    "times": [],
    "unmeasured": {case.name: "the run ended before it" for case in suite.cases},
  }
  until = start + CHECKS_SHARE * limit_s
  results["checks"] = mechanism(suite).check(suite.ours, suite.checks, until, say)
  save(results)
  with Torch(torch_python, mechanism(suite).rivals.WORKER) as torch:
    results["environment"]["torch"] = torch.versions
    results["environment"]["versions"] |= {"torch": torch.versions.get("torch")}
    results["absent"] = _absent(suite, torch)
    for who, why in results["absent"].items():
      say(f"absent: {who}: {why}")
    _time_all(suite, torch, deadline, results, say, save)
  results["seconds"] = time.monotonic() - start
  results["environment"]["clocks_after"] = nvidia_smi()
  save(results)
  return results


def _absent(suite: ChipSuite, torch: Torch) -> dict[str, str]:
  names = dict.fromkeys(who for group in suite.contenders.values() for who in group)
  return {who: why for who in names if (why := mechanism(suite).rivals.absent(who, suite, torch))}


def _time_all(
  suite: ChipSuite,
  torch: Torch,
  deadline: float,
  results: dict[str, Any],
  say: Callable[[str], None],
  save: Callable[[Mapping[str, Any]], None],
) -> None:
  """Every case, a few at a time; one is begun only if it can end in time as the slowest did."""
  start, slowest = time.monotonic(), 0.0
  for first in range(0, len(suite.cases), suite.together):
    group, begun = suite.cases[first : first + suite.together], time.monotonic()
    if begun + slowest > deadline:
      left = suite.cases[first:]
      results["unmeasured"] |= {case.name: "the time was up (--limit_s)" for case in left}
      say(f"time is up: {len(left)} cases were not measured")
      return
    with watched(f"{group[0].name} and the {len(group) - 1} after it", say) as progress:
      ready = _compile(suite, group, results["absent"], progress)
      for case in group:
        given, rivals_ready = ready.pop(case)
        rows = _time_case(suite, case, rivals_ready, torch, results, progress)
        del given, rivals_ready
        gc.collect()
        say(f"{case.name}: {rows} rows, {time.monotonic() - start:.0f} s of timing")
        save(results)
    slowest = max(slowest, time.monotonic() - begun)


def _compile(
  suite: ChipSuite, group: Sequence[AnyCase], absent: Mapping[str, str], progress: Progress
) -> dict[AnyCase, tuple[Inputs, dict[str, Ready]]]:
  """The contenders of this process, of several cases, compiled side by side."""
  library = mechanism(suite).rivals
  given = {case: library.inputs(suite, case) for case in group}
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    tasks = {
      (case, who): pool.submit(_prepared, who, suite, case, given[case])
      for case in group
      for who in (suite.ours, *suite.contenders[case.family])
      if who not in absent and who not in library.TORCH
    }
  found: dict[AnyCase, tuple[Inputs, dict[str, Ready]]] = {c: (given[c], {}) for c in group}
  for (case, who), task in tasks.items():
    found[case][1][who] = task.result()
    progress(f"the first runs of {case.name}")
  return found


def _prepared(who: str, suite: ChipSuite, case: AnyCase, given: Inputs) -> Ready:
  library = mechanism(suite).rivals
  try:
    return rivals.prepare(library.rival(who, suite, case), given)
  except Exception as problem:  # a library that cannot be imported, or has changed
    return Ready({}, dict.fromkeys(rivals.KINDS, rivals.one_line(problem)))


def _time_case(
  suite: ChipSuite,
  case: AnyCase,
  ready: dict[str, Ready],
  torch: Torch,
  results: dict[str, Any],
  progress: Progress,
) -> int:
  """Times one case and writes its rows, and who could not take part; returns how many there are."""
  library = mechanism(suite).rivals
  by_torch = [
    who
    for who in suite.contenders[case.family]
    if who in library.TORCH and who not in results["absent"]
  ]
  progress(f"the first runs of {case.name}")
  if by_torch:
    ready = ready | library.prepare_torch(by_torch, suite, case, torch)
  timers: dict[tuple[str, str], timing.Timer] = {}
  for who, one in ready.items():
    wrong = _wrong(suite, who, one)
    if one.error is not None:
      results["errors"][f"{who}/{case.name}"] = one.error
    if wrong and who == suite.ours:
      results["checks"]["verdict"] = "failed"
      row = {"name": f"answer at {case.name}", "quantities": {}, "failed": [wrong]}
      results["checks"]["rows"].append(row)
    for kind in rivals.KINDS:
      if kind in one.timers and not (wrong and who != suite.ours):
        timers[who, kind] = told(f"{who}, {kind}, {case.name}", one.timers[kind], progress)
      else:
        results["refused"][f"{who}/{kind}/{case.name}"] = one.refused.get(kind, wrong)
  try:
    measured = timing.interleave(timers, suite.rounds, least=suite.least, most_repeats=2000)
  except Exception as problem:  # a kernel that fails only when it is repeated
    results["unmeasured"][case.name] = rivals.one_line(problem)
    return 0
  rows = _rows(case, {key: times.row() for key, times in measured.items()})
  results["times"] += rows
  del results["unmeasured"][case.name]
  return len(rows)


def told(what: str, run: timing.Timer, progress: Progress) -> timing.Timer:
  """A timer that tells the watch what is about to run."""

  def telling(repeats: int) -> float:
    progress(what)
    return run(repeats)

  return telling


def _wrong(suite: ChipSuite, who: str, one: Ready) -> str:
  """What is wrong with an answer, or ""."""
  limit = rivals.TOLERANCE["float16" if who.endswith("f16") else suite.dtype]
  if one.error is None or one.error <= limit:
    return ""
  return f"its answer is wrong: an error of {one.error:.3g} of the largest value of a row"


def _rows(
  case: AnyCase, measured: Mapping[tuple[str, str], dict[str, Any]]
) -> list[dict[str, Any]]:
  rows = dict(measured)
  for who, kind in measured:
    if kind == rivals.BACKWARD and (who, rivals.FORWARD) in measured:
      rows[who, BOTH] = timing.added(measured[who, rivals.FORWARD], measured[who, kind])
  return [
    {"contender": who, "kind": kind, **case_row(case)} | times | case.rate(kind, times["median"])
    for (who, kind), times in rows.items()
  ]


@contextlib.contextmanager
def watched(what: str, say: Callable[[str], None]) -> Generator[Progress]:
  """Ends the program if what is inside stands still: a kernel on the chip cannot be interrupted.
  What it yields is to be called with what begins; from there the time counts anew.
  """
  last, over = (time.monotonic(), what), threading.Event()

  def progress(what: str) -> None:
    nonlocal last
    last = time.monotonic(), what

  def watch() -> None:
    while (left := last[0] + HANG - time.monotonic()) > 0:
      if over.wait(left):
        return
    say(
      f"no progress in {HANG:g} s during {last[1]}: a kernel does not end. What was measured "
      "before it is saved; --measure=false draws and judges that"
    )
    sys.stderr.flush()
    os._exit(3)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield progress
  finally:
    over.set()


def table(results: Mapping[str, Any]) -> str:
  """Rates, a line per case and kind, a column per contender; then what is wrong or missing."""
  shown = MECHANISMS[results["mechanism"]]
  rows = {(r["case"], r["kind"], r["contender"]): r[shown.rate] for r in results["times"]}
  names = list(dict.fromkeys(who for _, _, who in rows))
  lines = [f"{shown.unit:<46}" + "".join(f"{name:>17}" for name in names)]
  for case, kind in dict.fromkeys((case, kind) for case, kind, _ in rows):
    cells = (rows.get((case, kind, name)) for name in names)
    texts = (f"{'' if cell is None else f'{cell:.4g}':>17}" for cell in cells)
    lines.append((f"{f'{case}, {kind}':<46}" + "".join(texts)).rstrip())
  checked = results["checks"]
  lines.append(f"checks: {checked['verdict']} ({len(checked['rows'])} run)")
  for row in checked["rows"]:
    lines += [f"  {row['name']}: {what}" for what in row["failed"]]
  lines += [f"  not run: {name}" for name in checked["not_run"]]
  lines += [f"{who}: absent: {why}" for who, why in results["absent"].items()]
  lines += [f"{what}: refused: {why}" for what, why in results["refused"].items()]
  lines += [f"{case}: not measured: {why}" for case, why in results["unmeasured"].items()]
  return "\n".join(lines)


def chip_environment() -> dict[str, Any]:
  """The chip, its driver and clocks, and the libraries that jax brought."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "devices": jax.device_count(),
    "libraries": libraries(),
    "nvidia_smi": nvidia_smi(),
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def libraries() -> dict[str, str]:
  """The versions of NVIDIA's libraries and jax's plugins that pip installed."""
  found = {}
  for distribution in importlib.metadata.distributions():
    name = (distribution.name or "").lower().replace("_", "-")
    if re.match(r"jax-cuda|nvidia-(cuda|cudnn|cublas)|triton$", name):
      found[name] = distribution.version
  return dict(sorted(found.items()))


def nvidia_smi() -> dict[str, str] | None:
  """What the driver tells of the first GPU: clocks in MHz, power in W; None without one."""
  fields = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,"
    "temperature.gpu,memory.total"
  )
  if shutil.which("nvidia-smi") is None:
    return None
  command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    return None
  return dict(zip(fields.split(","), map(str.strip, done.stdout.split(",")), strict=False))
