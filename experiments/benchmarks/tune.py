"""Which block sizes are the fastest on this chip: a search, whose result is a table of data.

Every plan that fits into shared memory and registers is compiled, must give the answer of the
kernel's own plan, and is timed by turns with the others: the forward pass first, then each kernel
of the backward pass with the best of the others. A candidate reaches the kernel as a table would,
by the folder that FRUGAL_TUNED names (`pallas_kernels/tuned/__init__.py`).
"""

import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import chip, rivals, timing
from experiments.benchmarks.cases import Case, ChipSuite
from experiments.benchmarks.contenders import ROOT
from experiments.flags import UserError

type Plan = dict[str, Any]
type Plans = dict[str, Plan]

TABLE = "h200"
"""The table that Hopper kernels read."""
PASSES: Final = ("forward", "d_query", "d_key")
SHARED_MEMORY: Final = 227 * 1024 - 2048  # bytes of a block, less its barriers and rows of numbers
REGISTERS: Final = {2: (240, 24), 3: (160, 32)}  # warpgroups -> of a thread that computes, feeds
ROWS: Final = 64  # of a warpgroup's tile
WORTH: Final = 1.01  # how much faster than the kernel's own plan a plan must be


def table_of(chip_name: str) -> pathlib.Path:
  """Where a chip's table lies."""
  return ROOT / "pallas_kernels" / "tuned" / f"{chip_name}.json"


def candidates(what: str, H: int, h: int) -> list[Plan]:
  """Every plan of a pass whose operands, of two bytes each, fit into shared memory. Which of them
  spill registers is the compiler's to know and the clock's to tell.
  """
  forward = what == "forward"
  others = (64, 80, 96, 112, 128, 160, 176, 192) if forward else (32, 64, 80, 96, 128)
  rings = ((2, 2), (3, 3)) if forward else ((2, 2), (2, 1))
  found = []
  for warpgroups, width, stages in itertools.product(REGISTERS, others, rings):
    own = H + (h if h != H or not forward else 0)  # the output takes the queries' place
    memory = 2 * (warpgroups * ROWS * own + width * (stages[0] * H + stages[1] * h))
    if memory <= SHARED_MEMORY:
      registers, feeder = REGISTERS[warpgroups]
      found.append(
        {
          "warpgroups": warpgroups,
          "others": width,
          "stages": list(stages),
          "registers": registers,
          "feeder": feeder,
        }
      )
  return found


class Bench(NamedTuple):
  """One shape, under one mask, and where its candidates' tables are put."""

  suite: ChipSuite
  case: Case
  given: rivals.Inputs

  def entries(self, plans: Plans) -> list[dict[str, Any]]:
    """A table's entries for this case."""
    key = {"dtype": self.suite.dtype, "H": self.case.H, "h": self.case.H}
    causal = self.case.mask == "causal"
    return [{"what": what, **key, "causal": causal, "plan": plan} for what, plan in plans.items()]

  def arguments(self, what: str, plans: Plans) -> tuple[Any, ...]:
    """What a pass is called with: the backward pass, with what the forward pass left for it."""
    *qkv, d_out = self.given.arrays
    if what == "forward":
      return tuple(qkv)
    attend = rivals.rival(self.suite.ours, self.suite, self.case).attend
    with _table(self.entries(plans)):
      return jax.jit(lambda *qkv: jax.vjp(lambda *qkv: attend(*qkv), *qkv)[1])(*qkv), d_out

  def lower(self, what: str, plans: Plans, arguments: tuple[Any, ...]) -> Any:
    """A pass as it is traced while these plans are in the table."""
    attend = rivals.rival(self.suite.ours, self.suite, self.case).attend
    call = attend if what == "forward" else lambda pull, d_out: pull(d_out)
    with _table(self.entries(plans)):
      return jax.jit(lambda *given: call(*given)).lower(*arguments)


class _table:
  """While inside, kernels are traced with these entries."""

  def __init__(self, entries: list[dict[str, Any]]) -> None:
    self.entries = entries

  def __enter__(self) -> None:
    self.folder = tempfile.TemporaryDirectory()
    self.before = os.environ.get("FRUGAL_TUNED")
    path = pathlib.Path(self.folder.name, f"{TABLE}.json")
    path.write_text(json.dumps({"plans": self.entries}), encoding="utf-8")
    os.environ["FRUGAL_TUNED"] = self.folder.name

  def __exit__(self, *error: object) -> None:
    self.folder.cleanup()
    del os.environ["FRUGAL_TUNED"]
    if self.before is not None:
      os.environ["FRUGAL_TUNED"] = self.before


def search(
  suite: ChipSuite,
  limit_s: float,
  where: Mapping[str, Any],
  say: Callable[[str], None],
  save: Callable[[Mapping[str, Any]], None] = lambda table: None,
) -> dict[str, Any]:
  """The table of this chip.

  Raises:
    UserError: the kernel does not read tables, so that all plans would be its own.
  """
  start, slowest = time.monotonic(), 0.0
  table: dict[str, Any] = {
    "jax": where["versions"]["jax"],
    "date": where["date"],
    "commit": where["commit"],
    "device": where["device"],
    "environment": dict(where),
    "plans": [],
    "tried": [],
    "not_tuned": [],
  }
  softmax = [case for case in suite.cases if isinstance(case, Case)]
  longest = max(case.T for case in softmax)
  cases = [case for case in softmax if longest == case.T and case.mask in ("full", "causal")]
  for index, case in enumerate(cases):
    bench = Bench(suite, case, rivals.inputs(suite, case))
    if index == 0:
      _refuse_the_deaf(bench)
    plans: Plans = {}
    for what in PASSES:
      begun = time.monotonic()
      if begun - start + slowest > limit_s:
        table["not_tuned"].append(f"{case.name}: {what}")
        continue
      with chip.watched(f"{what} of {case.name}", say) as progress:
        tried = _try(bench, what, plans, say, progress)
      best = tried[0]
      if best["plan"]:
        plans[what] = best["plan"]
        (entry,) = bench.entries({what: best["plan"]})
        measured = {"seconds": best["median"], "own_plan_seconds": _own(tried)["median"]}
        table["plans"].append(entry | measured)
      table["tried"] += tried
      save(table)
      slowest = max(slowest, time.monotonic() - begun)
  return table


def _refuse_the_deaf(bench: Bench) -> None:
  """A plan that cannot be must be refused by the kernel: so it shows that it reads the table."""
  for what in PASSES:
    arguments = bench.arguments(what, {})
    try:
      bench.lower(what, {what: {"others": 7}}, arguments)
    except Exception:  # what it says is its own business
      continue
    raise UserError(
      f"implementation {bench.suite.ours!r} does not look up pallas_kernels/tuned for {what!r}: "
      "there is nothing to tune"
    )


def _try(
  bench: Bench, what: str, plans: Plans, say: Callable[[str], None], progress: chip.Progress
) -> list[dict[str, Any]]:
  """Every plan of one pass, the one to use first: {} is the kernel's own."""
  tried: list[Plan] = [{}, *candidates(what, bench.case.H, bench.case.H)]
  rows = [
    {"case": bench.case.name, "what": what, "plan": plan, "median": None, "refused": ""}
    for plan in tried
  ]
  arguments = bench.arguments(what, plans)
  programs = _compiled(bench, what, plans, arguments, rows)
  truth = None
  for index in list(programs):
    progress(f"{what} of {bench.case.name} by {tried[index]}")
    try:
      answer = _answer(programs[index](*arguments))
    except Exception as problem:  # a plan that the chip refuses
      rows[index]["refused"] = rivals.one_line(problem)
    else:
      truth = answer if index == 0 else truth
      if truth is None or not _alike(answer, truth):
        rows[index]["refused"] = "its answer differs from that of the kernel's own plan"
    if rows[index]["refused"]:
      del programs[index]
  timers = {
    index: chip.told(f"{what} by {tried[index]}", timing.queue_timer(run, arguments), progress)
    for index, run in programs.items()
  }
  measured = timing.interleave(timers, bench.suite.rounds, least=bench.suite.least)
  for index, times in measured.items():
    rows[index]["median"] = times.row()["median"]
  found = _ordered(rows)
  say(f"{bench.case.name}, {what}: {len(measured)} of {len(rows)}, {found[0]['plan'] or 'its own'}")
  return found


def _compiled(
  bench: Bench, what: str, plans: Plans, arguments: tuple[Any, ...], rows: list[dict[str, Any]]
) -> dict[int, Callable[..., Any]]:
  """The programs of all plans that can be built, by their places; the others' rows say why not."""
  lowered: dict[int, Any] = {}
  for index, row in enumerate(rows):
    try:
      chosen = plans | ({what: row["plan"]} if row["plan"] else {})
      lowered[index] = bench.lower(what, chosen, arguments)
    except Exception as problem:  # one that the kernel cannot be written for
      row["refused"] = rivals.one_line(problem)
  programs = {}
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    tasks = {index: pool.submit(program.compile) for index, program in lowered.items()}
    for index, task in tasks.items():
      try:
        programs[index] = task.result()
      except Exception as problem:  # one that the compiler refuses
        rows[index]["refused"] = rivals.one_line(problem)
  return programs


def _ordered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """The fastest first, but the kernel's own plan where none is faster by what it is worth."""
  rows = sorted(rows, key=lambda row: row["median"] or float("inf"))
  own = _own(rows)
  if own["median"] and own["median"] < WORTH * rows[0]["median"]:
    rows.remove(own)
    rows.insert(0, own)
  return rows


def _own(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
  return next(row for row in rows if not row["plan"])


def _answer(out: Any) -> list[np.ndarray]:
  return [np.asarray(x.astype(jnp.float32)) for x in jax.tree.leaves(out)]


def _alike(got: list[np.ndarray], want: list[np.ndarray]) -> bool:
  """Equal but for the order of sums."""
  pairs = zip(got, want, strict=True)
  return all(np.max(np.abs(a - b)) <= 2e-2 * np.max(np.abs(b)) for a, b in pairs)
