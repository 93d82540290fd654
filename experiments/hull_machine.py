"""A transformer that is a computer, and how fast it runs: a hull's cache against a dense one.

    python -m experiments.hull_machine
    python -m experiments.hull_machine --program=add --size=50 --caches=hull --lengths=500,1000

Its weights are written, not learned (see `experiments.machine.transformer`): two layers with heads
of width 2 that look at one place. The prompt is a program for a machine with one instruction, and
every token that follows is one step of it, compared with an interpreter in plain Python. The
default sorts a list in more than a million steps.

Tokens per second against the length of the trace: with the hull over the whole of it, in one
compiled loop; with the dense cache over a hundred tokens, computed and compared, before each
length. Writes experiments/results/hull_machine.json and draws experiments/results/hull_machine.png.
"""

import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import figures, files, flags, provenance
from experiments.flags import UserError, knob
from experiments.machine import programs, subleq, transformer
from experiments.machine.programs import PROGRAMS, Task
from experiments.machine.transformer import CACHES, Weights

RESULTS = pathlib.Path(__file__).parent / "results" / "hull_machine.json"
CHUNK = 1000
"""Tokens of a call with the hull; what is between two calls is a percent of it."""
WINDOW = 100
"""Tokens that a dense cache is timed over."""
COLORS: Final[Mapping[str, str]] = {"hull": "#1f5fb4", "dense": "#c05a00"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The command line."""

  program: str = knob("sort", f"One of {', '.join(PROGRAMS)}.")
  size: int = knob(0, "Numbers, digits or bits that it is given; 0 is its own.", "[0, 4096)")
  steps: int = knob(2_000_000, "Steps at the most.", "[1, 8000000]")
  caches: str = knob("hull,dense", f"With commas: {', '.join(CACHES)}.")
  lengths: str = knob("1e3,3e3,1e4,3e4,1e5,3e5,1e6", "Tokens of a trace to measure at.")
  seconds: float = knob(60.0, "After so many no longer trace is begun with the dense cache.")
  out: str = knob("", "Results, JSON, the picture beside it; empty is experiments/results.")


@dataclasses.dataclass(frozen=True)
class Run:
  """What was asked for, checked."""

  task: Task
  caches: tuple[str, ...]
  lengths: tuple[int, ...]
  tokens: np.ndarray
  """`T 4`: the whole trace, as the interpreter has it."""

  @property
  def cells(self) -> int:
    """Tokens of the prompt."""
    return len(self.task.program.image)


def prepare(options: Options) -> Run:
  """Reads the command line, makes the program, interprets it."""
  if options.program not in PROGRAMS:
    raise UserError(flags.unknown("--program", options.program, PROGRAMS))
  caches = tuple(options.caches.split(","))
  for cache in caches:
    if cache not in CACHES:
      raise UserError(flags.unknown("--caches", cache, CACHES))
  try:
    lengths = sorted({int(float(text)) for text in options.lengths.split(",")})
  except (ValueError, OverflowError) as error:
    raise UserError(f"--lengths are numbers with commas, not {options.lengths!r}") from error
  if lengths[0] < 2:
    raise UserError(f"--lengths are of 2 tokens at the least, not {options.lengths!r}")
  task = programs.make(options.program, options.size)
  tokens = trace(task.program.image, options.steps)
  fitting = tuple(n for n in lengths if n <= len(tokens))
  return Run(task, caches, fitting or (len(tokens),), tokens)


def trace(image: tuple[int, ...], steps: int) -> np.ndarray:
  """`T 4`: the memory and the steps of an interpreted program, as tokens."""
  done = itertools.islice(subleq.interpret(image), steps)
  tokens = [(step.next, step.address, step.address**2, step.value) for step in done]
  return np.concatenate([transformer.prompt(image), np.asarray(tokens, np.float32)])


def decode(
  weights: Weights, cache: str, tokens: np.ndarray, given: int, chunk: int
) -> Iterator[tuple[np.ndarray, float]]:
  """As many tokens as these, a chunk at a time, from the first `given` of them alone; and the
  seconds that each took.
  """
  T = len(tokens)
  padded = -(-T // chunk) * chunk
  prompt = np.zeros((padded, 1, transformer.TOKEN), np.float32)
  prompt[:given, 0] = tokens[:given]
  is_given = np.arange(padded)[:, None] < given
  decoder = transformer.start(weights, cache, padded)
  program: Any = None
  for at in range(0, padded, chunk):
    part = jnp.asarray(prompt[at : at + chunk]), jnp.asarray(is_given[at : at + chunk])
    program = program or transformer.decode.lower(weights, decoder, *part, cache=cache).compile()
    start = time.perf_counter()
    decoder, out = program(weights, decoder, *part)
    out = np.asarray(out)[:, 0]
    yield out[: T - at], time.perf_counter() - start


def first_wrong(tokens: np.ndarray, right: np.ndarray) -> int | None:
  """The first token that is not the interpreter's."""
  wrong = np.flatnonzero((tokens != right).any(-1))
  return int(wrong[0]) if wrong.size else None


def run_hull(weights: Weights, run: Run) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """The whole trace as the transformer computes it, and a row for each length."""
  parts, seconds, told = [], [], time.monotonic()
  for tokens, took in decode(weights, "hull", run.tokens, run.cells, CHUNK):
    parts.append(tokens)
    seconds.append(took)
    if time.monotonic() - told > 10:
      at, told = figures.number(CHUNK * len(seconds)), time.monotonic()
      print(f"hull: {at} tokens, {CHUNK / took:.0f} tokens/s", file=sys.stderr, flush=True)
  tokens = np.concatenate(parts)
  wrong = first_wrong(tokens, run.tokens)
  rows = []
  for length in run.lengths:
    end = max(length // CHUNK, 1)
    rate = CHUNK / float(np.median(seconds[max(end // 2, end - 10) : end]))
    rows.append(_row("hull", length, rate, wrong is None or wrong >= length))
  return tokens, rows


def run_dense(weights: Weights, run: Run, most_seconds: float) -> list[dict[str, Any]]:
  """A row for each length: its last WINDOW tokens, in a cache that has the room for them."""
  rows, begun = [], time.perf_counter()
  for length in run.lengths:
    if rows and time.perf_counter() - begun > most_seconds:
      break
    count = min(WINDOW, length - 1)
    right = run.tokens[length - count : length]
    decoder = transformer.resumed(
      weights, jnp.asarray(run.tokens[: length - count + 1]), max_length=length
    )
    # Of the window only what lies in the prompt is given; mostly nothing.
    is_given = np.arange(length - count, length)[:, None] < run.cells
    given = jnp.asarray(right[:, None])
    arguments = (weights, decoder, given, jnp.asarray(is_given))
    program = transformer.decode.lower(*arguments, cache="dense").compile()
    start = time.perf_counter()
    _, out = program(*arguments)
    tokens = np.asarray(out)[:, 0]
    rate = count / (time.perf_counter() - start)
    rows.append(_row("dense", length, rate, first_wrong(tokens, right) is None))
  return rows


def _row(cache: str, length: int, rate: float, exact: bool) -> dict[str, Any]:
  return {"cache": cache, "length": length, "tokens_per_second": round(rate, 1), "exact": exact}


def memory(tokens: np.ndarray) -> list[int]:
  """What a trace leaves in memory: the last that was written to each address."""
  cells: dict[int, int] = {}
  for _, address, _, value in tokens.astype(np.int64).tolist():
    cells[address] = value
  return [cells[address] for address in range(len(cells))]


def lines(run: Run, tokens: np.ndarray, places: Sequence[int]) -> str:
  """Tokens of a trace, for people."""
  name = run.task.program.name
  text = [f"{'token':>9}  {'instruction':<12}{'writes':<22}then"]
  for at in places:
    following, address, _, value = (int(x) for x in tokens[at])
    where = "" if at < run.cells else name(int(tokens[at - 1, 0]))
    write = f"{name(address)} = {value}"
    text.append(f"{at:>9}  {where:<12}{write:<22}{name(following)}")
  return "\n".join(text)


def shown(run: Run, tokens: np.ndarray) -> str:
  """The prompt's first lines, and the first and the last that the transformer computed."""
  T, P = len(tokens), run.cells
  parts = [range(min(4, P)), range(P, min(P + 10, T)), range(max(P + 10, T - 6), T)]
  return "\n      ...\n".join(
    text if i == 0 else text.partition("\n")[2]
    for i, text in enumerate(lines(run, tokens, part) for part in parts)
    if text.count("\n")
  )


def count(weights: Weights) -> dict[str, int]:
  """The size of the transformer."""
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(weights)]
  return {
    "width": transformer.WIDTH,
    "layers": len(weights.layers),
    "heads": sum(layer.q.shape[1] for layer in weights.layers),
    "weights": sum(leaf.size for leaf in leaves),
    "weights_not_0": sum(int(np.count_nonzero(leaf)) for leaf in leaves),
  }


def picture(results: Mapping[str, Any]) -> Figure:
  """Tokens per second against the length of the trace."""
  theme = figures.LIGHT
  figure = Figure(figsize=(6.4, 3.9), facecolor=theme.surface, layout="constrained")
  axes = figure.add_subplot()
  for cache, color in COLORS.items():
    mine = [row for row in results["rows"] if row["cache"] == cache]
    lengths, rates = ([row[x] for row in mine] for x in ("length", "tokens_per_second"))
    axes.plot(lengths, rates, color=color, marker="o", markersize=4)
    if mine:
      name = f"{cache} cache, {results['transformer']['heads']} heads"
      axes.annotate(
        name,
        (lengths[0], rates[0]),
        xytext=(0, 7),
        textcoords="offset points",
        color=color,
        fontsize=9,
      )
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.margins(x=0.08, y=0.16)
  axes.xaxis.set_major_formatter(lambda value, _: figures.number(value))
  axes.yaxis.set_major_formatter(lambda value, _: figures.number(value))
  axes.set_xlabel("tokens of the trace", color=theme.muted)
  axes.set_title("Tokens per second", loc="left", color=theme.ink, fontsize=10)
  axes.grid(color=theme.grid)
  axes.set_axisbelow(True)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.tick_params(colors=theme.muted, length=0)
  return figure


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line for each cache and length."""
  text = [f"{'cache':<7}{'tokens':>9}{'tokens/s':>11}  exact"]
  for row in rows:
    exact = "yes" if row["exact"] else "NO"
    text.append(f"{row['cache']:<7}{row['length']:>9}{row['tokens_per_second']:>11.0f}  {exact}")
  return "\n".join(text)


def main(argv: Sequence[str]) -> int:
  """Runs the program, compares, measures, writes, draws. 1 if a token is wrong."""
  options = flags.parse(argv, Options(), doc=__doc__ or "")
  with flags.blame_user():
    flags.check_bounds(options)
    run = prepare(options)
  path = pathlib.Path(options.out or RESULTS)
  provenance.prepare(path)
  jax.config.update("jax_platforms", "cpu")
  weights, steps = transformer.compile_weights(), len(run.tokens) - run.cells
  size = count(weights)
  print(f"{options.program}: {run.task.question}\n{run.cells} cells, {steps} steps; {size}")
  results: dict[str, Any] = {
    "environment": provenance.environment(("jax", "jaxlib", "numpy")),
    "program": {"name": options.program, "cells": run.cells, "steps": steps},
    "transformer": size,
    "rows": [],
  }
  wrong = None
  if "hull" in run.caches:
    start = time.perf_counter()
    tokens, results["rows"] = run_hull(weights, run)
    seconds = time.perf_counter() - start
    wrong = first_wrong(tokens, run.tokens)
    results["program"] |= {"first_wrong": wrong, "seconds": round(seconds, 1)}
    print(shown(run, tokens))
    print(_verdict(run, tokens, wrong))
  if "dense" in run.caches:
    results["rows"] += run_dense(weights, run, options.seconds)
  files.write_results(path, results)
  path.with_suffix(".png").write_bytes(figures.png(picture(results)))
  print(table(results["rows"]))
  return int(wrong is not None or not all(row["exact"] for row in results["rows"]))


def _verdict(run: Run, tokens: np.ndarray, wrong: int | None) -> str:
  if wrong is not None:
    return f"token {wrong} is not the interpreter's:\n{lines(run, tokens, [wrong])}"
  exact = f"all {len(tokens) - run.cells} steps are the interpreter's"
  if tokens[-1, 0] != tokens[-2, 0]:
    return f"{exact}; the program goes on"
  answer = run.task.read(memory(tokens))
  right = "right" if answer == run.task.answer else f"WRONG, it is {run.task.answer}"
  return f"{exact}; it halted, and its answer is {right}: {answer[:60]}"


if __name__ == "__main__":
  flags.run_main(main)
