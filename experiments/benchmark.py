"""Measures time and memory of every mechanism and of its peers, against recorded targets.

    python -m experiments.benchmark --suite=cpu --check
    python -m experiments.benchmark --suite=hull --check       # hard-max heads, 10 minutes
    python -m experiments.benchmark --suite=gpu --check        # on a Hopper GPU, 8 minutes at most

Likewise gpu-linear and gpu-hardmax, linear and hard-max attention.

Contenders of one length are timed by turns, so that they meet the same machine, and judged by
medians. Each first gives its answer to a short input. A peer that is wrong or fails is left out
from there on, with the reason; if one of ours is wrong, that ends the run. Peers are optional:
tokamax by `pip install 'frugal-attention[peers]'`, PyTorch in this Python or in the one that
--torch_python names. Results and their picture go to experiments/results.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import files, flags, provenance
from experiments.benchmarks import (
  chip,
  contenders,
  hull,
  memory,
  picture,
  resident,
  targets,
  timing,
  tune,
)
from experiments.benchmarks.cases import CHIP_SUITES
from experiments.benchmarks.contenders import BOTH, FORWARD, PEERS, STEP, Torch
from experiments.benchmarks.hull import HULL_SUITES
from experiments.benchmarks.rivals import one_line
from experiments.benchmarks.suites import SUITES, Suite
from experiments.flags import UserError, knob

RESULTS = pathlib.Path(__file__).parent / "results"
# Largest error, as a share of the largest true value, of an answer that counts as right.
TOLERANCE = 1e-3
NAMES = (*SUITES, *HULL_SUITES, *CHIP_SUITES)
# Seconds after which the idle threads of another library sleep.
SETTLE = 0.05
# Decoding steps in a row, at most: a cache has room for so many beyond the tokens before them.
STEPS = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The command line."""

  suite: str = knob("cpu", f"What is measured: {', '.join(NAMES)}.")
  check: bool = knob(False, "Exit 1, naming each target that is missed or was not measured.")
  out: str = knob("", "Results, JSON, with a picture beside them; empty is experiments/results.")
  torch_python: str = knob("", "A Python that has PyTorch, if this one does not.")
  measure: bool = knob(True, "False judges and draws what --out holds.")
  limit_s: float = knob(
    480.0, "Seconds after which a suite on a chip leaves out the rest.", "(0, inf)"
  )
  tune: bool = knob(False, "Try block sizes on this chip and write pallas_kernels/tuned instead.")


def say(text: str) -> None:
  """Progress, for whoever waits."""
  print(text, file=sys.stderr, flush=True)


def measure(name: str, torch_python: str = "") -> dict[str, Any]:
  """Runs a suite: the rows of time and memory, who was absent, and where it ran."""
  suite, start = SUITES[name], time.time()
  rows: list[dict[str, Any]] = []
  errors: dict[str, float] = {}
  with Torch(torch_python) as torch:
    absent, names = _absent(suite, torch), contenders.names(suite)
    for T in sorted({T for who in names for T in contenders.lengths(suite, who)}):
      group = [who for who in names if who not in absent and T in contenders.lengths(suite, who)]
      new = [who for who in group if who not in errors]
      errors |= _refuse_the_wrong(suite, new, T, torch, absent)
      rows += _time_length(suite, [who for who in group if who not in absent], T, torch, absent)
      say(f"T={T}: timed {len(group)} contenders, {time.time() - start:.0f} s since the start")
    rows += _time_steps(suite)
    say(f"decoding steps: timed, {time.time() - start:.0f} s since the start")
  return {
    "suite": name,
    "environment": _environment(torch.versions)
    | {
      "settle_seconds": SETTLE,
      "rounds": {"most": suite.rounds, "from": suite.long, "then": suite.few_rounds},
    },
    "shape": {"B": 1, "N": suite.heads, "K": suite.heads, "H": suite.head_dim, "h": suite.head_dim},
    "absent": absent,
    "errors": errors,
    "times": rows,
    "memory": _measure_memory(name, absent, torch_python),  # which may add to those absent
  }


def _absent(suite: Suite, torch: Torch) -> dict[str, str]:
  """Who cannot be measured here, and why."""
  found = {name: contenders.absent(name) for name in suite.lengths}
  found |= {name: torch.absence(name) for name in contenders.IN_TORCH if name in suite.lengths}
  found["memory"] = resident.unsupported()
  absent = {name: why for name, why in found.items() if why}
  for why in absent.values():
    say(f"absent: {why}")
  return absent


class PeerFailed(Exception):
  """Raised by a peer's timer; carries the peer's name and the reason."""


def _leave_out(absent: dict[str, str], name: str, why: str) -> None:
  absent[name] = why
  say(f"left out: {name}: {why}")


def _refuse_the_wrong(
  suite: Suite, group: Sequence[str], T: int, torch: Torch, absent: dict[str, str]
) -> dict[str, float]:
  """Each contender's error at its shortest length; adds to `absent` the peers that are not right.

  Raises:
    RuntimeError: one of ours is wrong.
  """
  errors = {}
  for name in group:
    try:
      if name in contenders.IN_TORCH:
        torch.load(suite, T)
        error = torch.error(name, suite, T)
      else:
        error = contenders.error(contenders.make(name), suite, T)
      if not error <= TOLERANCE:
        raise RuntimeError(f"{name} is wrong at T={T}: its error is {error:.2g}, not timed")
    except Exception as problem:  # a library that has changed, or a process that ended
      if name not in PEERS:
        raise
      _leave_out(absent, name, one_line(problem))
    else:
      errors[name] = error
  return errors


def _time_length(
  suite: Suite, group: Sequence[str], T: int, torch: Torch, absent: dict[str, str]
) -> list[dict[str, Any]]:
  """Rows of forward, and of forward and backward, at one length; adds to `absent` the peers that
  fail.
  """
  arguments, rows = contenders.arguments(suite, T), []
  load = functools.cache(lambda: torch.load(suite, T))
  for kind in (FORWARD, BOTH):
    timers: dict[str, timing.Timer] = {}
    for name in group:
      if name in contenders.IN_TORCH:
        run = _torch_timer(torch, load, kind, contenders.IN_TORCH[name][0])
      else:
        contender = contenders.make(name)
        extra = contenders.inputs(contender, suite, T)
        function = jax.jit(contenders.program(contender, kind))
        run = timing.timer(function, [*contenders.place(name, arguments), extra])
      timers[name] = _peer_timer(name, f"{kind} at T={T}", run) if name in PEERS else run
    rounds = suite.few_rounds if suite.long <= T else suite.rounds
    measured = _by_turns(timers, rounds, absent)
    rows += [{"contender": who, "kind": kind, "T": T} | t.row() for who, t in measured.items()]
  return rows


def _torch_timer(torch: Torch, load: Callable[[], None], kind: str, backend: str) -> timing.Timer:
  """Its first run hands the inputs over, if nobody did."""

  def run(repeats: int) -> float:
    load()
    return torch.ask("time", kind=kind, backend=backend, repeats=repeats)["seconds"]

  return run


def _peer_timer(name: str, what: str, run: timing.Timer) -> timing.Timer:
  """The timer of a peer, whose failures bear its name."""

  def named(repeats: int) -> float:
    try:
      return run(repeats)
    except Exception as problem:  # whatever it is, it is not ours
      raise PeerFailed(name, f"{what}: {one_line(problem)}") from problem

  return named


def _by_turns(
  timers: Mapping[str, timing.Timer], rounds: int, absent: dict[str, str]
) -> dict[str, timing.Times]:
  """Times everybody, and begins anew without a peer that fails."""
  while True:
    here = {name: run for name, run in timers.items() if name not in absent}
    settle = SETTLE if here.keys() & contenders.IN_TORCH.keys() else 0.0
    try:
      return timing.interleave(here, rounds, settle=settle)
    except PeerFailed as failure:
      _leave_out(absent, *failure.args)


def _time_steps(suite: Suite) -> list[dict[str, Any]]:
  """Rows of one decoding step after T tokens; all of them take turns, to be compared across T."""
  timers = {
    (name, T): _step_timer(suite, name, T) for name, lengths in suite.steps.items() for T in lengths
  }
  measured = timing.interleave(timers, suite.rounds, most_repeats=2000)
  return [
    {"contender": name, "kind": STEP, "T": T} | times.row() for (name, T), times in measured.items()
  ]


def _step_timer(suite: Suite, name: str, T: int) -> timing.Timer:
  contender = contenders.make(name)
  layer = contender.layer
  assert layer is not None, f"{name} is ours: others have no decoding step here"
  N, H = suite.heads, suite.head_dim
  state = layer.init_state(
    1, num_heads=N, num_kv_heads=N, head_dim=H, value_dim=H, max_length=T + STEPS, dtype=jnp.float32
  )
  extra = contenders.inputs(contender, suite, T)
  state, _ = jax.jit(layer.prefill)(state, *contenders.arguments(suite, T)[:3], **extra)
  token = [x[:, 0] for x in contenders.arguments(suite, 1)[:3]]
  extra = {name: x[:, 0] for name, x in contenders.inputs(contender, suite, 1).items()}
  step = lambda state, q, k, v: layer.step(state, q, k, v, **extra)
  return timing.state_timer(jax.jit(step, donate_argnums=0), state, token, STEPS)


def _measure_memory(name: str, absent: dict[str, str], torch_python: str) -> list[dict[str, Any]]:
  """Rows of peak memory, each from a fresh process; adds to `absent` those that were refused."""
  suite, rows = SUITES[name], []
  for who, lengths in suite.memory.items():
    if who in absent or "memory" in absent:
      continue
    for T in lengths:
      for kind in (FORWARD, BOTH):
        try:
          if who == "torch":
            found = memory.measure_torch(torch_python, name, kind, T)
          else:
            found = memory.measure(name, who, kind, T)
        except Exception as problem:  # what was measured before is kept
          _leave_out(absent, targets.memory_of(f"{who}/{kind}/{T}"), one_line(problem))
          continue
        qkvo = 4 * T * suite.heads * suite.head_dim * 4
        rows.append({"contender": who, "kind": kind, "T": T, "qkvo": qkvo} | found)
        say(f"memory: {who}, {kind}, T={T}: {found['growth'] / 2**20:.0f} MiB")
  return rows


def _environment(torch: Mapping[str, Any]) -> dict[str, Any]:
  """Where and with what the numbers were made, of torch what it tells."""
  told = provenance.environment(("jax", "jaxlib", "flax", "numpy", "tokamax"))
  return told | {
    "device": jax.devices()[0].device_kind,
    "torch_threads": torch.get("threads"),
    "versions": told["versions"] | {"torch": torch.get("torch"), "fla": torch.get("fla")},
  }


def _use_cores(count: int) -> None:
  """Keeps this process and its children on so many cores; call it before jax starts threads."""
  if count > resident.cores():
    say(f"the suite is meant for {count} cores and this machine lets us use {resident.cores()}")
  elif count < resident.cores() and count and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _use_devices(count: int) -> None:
  """At least so many devices on this CPU; call it before jax makes them."""
  if jax.config.jax_num_cpu_devices < count:
    jax.config.update("jax_num_cpu_devices", count)


def times_table(results: Mapping[str, Any]) -> str:
  """Median milliseconds, a line per contender and kind, a column per length."""
  rows = {(r["contender"], r["kind"], r["T"]): r["median"] for r in results["times"]}
  lengths = sorted({T for _, _, T in rows})
  lines = [f"{'median ms':<40}" + "".join(f"{T:>10}" for T in lengths)]
  for who, kind in dict.fromkeys((who, kind) for who, kind, _ in rows):
    cells = (rows.get((who, kind, T)) for T in lengths)
    texts = (f"{'' if cell is None else f'{1e3 * cell:.4g}':>10}" for cell in cells)
    lines.append((f"{f'{who}, {kind}':<40}" + "".join(texts)).rstrip())
  lines += [f"{what:<40}    absent: {why}" for what, why in results["absent"].items()]
  return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
  """Measures, writes, draws, prints; returns 1 when asked to check and a target is not met."""
  options = flags.parse(argv, Options(), doc=__doc__ or "")
  if options.suite not in NAMES:
    raise UserError(flags.unknown("--suite", options.suite, NAMES))
  with flags.blame_user():
    flags.check_bounds(options)
  on_chip = options.suite in CHIP_SUITES
  tunable = [name for name, suite in CHIP_SUITES.items() if suite.mechanism == "softmax"]
  if options.tune and options.suite not in tunable:
    raise UserError(f"--tune goes with {' or '.join(tunable)}, not with {options.suite!r}")
  path, results = _measured_on_chip(options) if on_chip else _measured(options)
  if options.tune:
    return 0
  verdicts = [targets.judge(target, results) for target in targets.load(options.suite)]
  results["targets"] = [verdict._asdict() for verdict in verdicts]
  files.write_results(path, results)
  show = chip.table if on_chip else times_table
  print(show(results), targets.table(verdicts), sep="\n\n")
  if on_chip:
    draw = chip.mechanism(CHIP_SUITES[options.suite]).draw
  else:
    draw = hull.draw if options.suite in HULL_SUITES else picture.draw
  path.with_suffix(".png").write_bytes(draw(results))
  unmet = [f"{v.what} ({v.verdict})" for v in verdicts if v.verdict != "met"]
  if on_chip and results["checks"]["verdict"] != "passed":
    unmet.insert(0, f"checks: {results['checks']['verdict']}")
  if options.check and unmet:
    print("\nnot met: " + "; ".join(unmet), file=sys.stderr)
    return 1
  return 0


def _measured(options: Options) -> tuple[pathlib.Path, dict[str, Any]]:
  """Where the results of a suite go, and what they are."""
  path = pathlib.Path(options.out or RESULTS / f"{options.suite}.json")
  if not options.measure:
    return path, _read(path, options.suite)
  provenance.prepare(path)
  jax.config.update("jax_platforms", "cpu")
  if options.suite in HULL_SUITES:
    suite = HULL_SUITES[options.suite]
    _use_cores(suite.cores)
    _use_devices(max(suite.devices))
    return path, hull.measure(options.suite, _environment({}), say)
  _use_cores(SUITES[options.suite].cores)
  _use_devices(resident.cores())
  return path, measure(options.suite, options.torch_python)


def _measured_on_chip(options: Options) -> tuple[pathlib.Path, dict[str, Any]]:
  """The same of a suite on a chip, whose file bears the chip's name."""
  what = CHIP_SUITES[options.suite].mechanism
  if not options.measure:
    made = sorted(RESULTS.glob(f"*_{what}.json"), reverse=True)
    path = pathlib.Path(options.out or next(iter(made), RESULTS / f"h200_{what}.json"))
    return path, _read(path, options.suite)
  name = chip.prepare(options.suite)
  if options.tune:
    path = pathlib.Path(options.out or tune.table_of(name))
    provenance.prepare(path)
    where = _environment({}) | chip.chip_environment()
    save = functools.partial(files.write_results, path)
    found = tune.search(CHIP_SUITES[options.suite], options.limit_s, where, say, save)
    save(found)
    return path, found
  path = pathlib.Path(options.out or RESULTS / f"{name}_{what}.json")
  provenance.prepare(path)
  results = chip.measure(
    options.suite,
    environment=_environment({}),
    torch_python=options.torch_python,
    limit_s=options.limit_s,
    say=say,
    save=functools.partial(files.write_results, path),
  )
  return path, results


def _read(path: pathlib.Path, suite: str) -> dict[str, Any]:
  """What --measure=false judges and draws, after it was made sure that it can be written again."""
  with flags.blame_user():
    results = json.loads(path.read_text(encoding="utf-8"))
  held = results.get("suite") if isinstance(results, dict) else None
  if held != suite:
    raise UserError(f"{path} holds the suite {held!r}, not {suite!r}")
  missing = [part for part in _parts(suite) if part not in results]
  if missing:
    raise UserError(f"{path} holds a part of the suite {suite!r}: it lacks {', '.join(missing)}")
  provenance.prepare(path)
  return results


def _parts(suite: str) -> list[str]:
  """What judging and drawing read of the results of a suite."""
  parts = ["environment", "absent", "times"]
  if suite in CHIP_SUITES:
    return [*parts, "mechanism", "ours", "dtype", "cases", "checks", "refused", "unmeasured"]
  return [*parts, "memory", *(["shape"] if suite in SUITES else [])]


if __name__ == "__main__":
  flags.run_main(main)
