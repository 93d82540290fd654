"""Whether an implementation is right on this chip: outputs, log-sum-exps and every gradient.

The truth is `reference` in float32 on the same numbers (`tiled` in float32 where T is long). As
FlashAttention does it, an error may be twice that of plain XLA in the same dtype, and a small share
of the largest true value more. Each program runs twice and must give the same bits.

    python -m experiments.benchmarks.checks IMPLEMENTATION NAME...

runs in a process of its own, because a kernel that never ends takes its process with it: it prints
a line of JSON when a check is compiled, when it starts, and when it has the answer. `run` reads
them, ends a process that is silent for too long, and starts another behind the check that was lost.
"""

import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from attention import dot_product_attention, masks
from attention.dropout import make_dropout
from attention.masks import Mask
from experiments.benchmarks.contenders import ROOT
from experiments.benchmarks.rivals import one_line

# What an error may be beyond twice that of XLA, as a share of the largest true value.
SHARE: Final[Mapping[str, float]] = {"float32": 1e-5, "float16": 3e-4, "bfloat16": 1e-3}
# The same of the few numbers that are sums over all pairs, where "twice" compares two accidents.
SHARE_OF_SUMS: Final[Mapping[str, float]] = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 1e-2}
SUMS: Final = ("d alibi_slopes", "d sinks")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
  """One call and its gradients."""

  name: str
  B: int = 2
  T: int = 512
  S: int = 512
  N: int = 4
  K: int = 4
  H: int = 64
  h: int = 64
  dtype: str = "bfloat16"
  mask: Callable[[], Mask] = masks.everything
  logit_cap: float | None = None
  bias: tuple[int, ...] | None = None
  """The shape of a bias that has a gradient."""
  padded: bool = False
  """Whether all of every third query's bias is -1e9."""
  alibi: bool = False
  sinks: bool = False
  dropout: float = 0.0
  long: bool = False
  """Whether T x S numbers are too many for the oracle."""

  def share(self, name: str) -> float:
    """What a quantity's error may be beyond twice that of XLA, of its largest true value."""
    # The log-sum-exp is float32 whatever the inputs are, and so are its products.
    return (SHARE_OF_SUMS if name in SUMS else SHARE)["float32" if name == "lse" else self.dtype]


def _ids(B: int, length: int, mean: int, seed: int = 0) -> jax.Array:
  """Sorted document numbers `B length`."""
  ends = np.random.default_rng(seed).random((B, length)) < 1 / mean
  return jnp.asarray(np.cumsum(ends, axis=1), jnp.int32)


def _scattered(*shape: int) -> Mask:
  """A third of all pairs, at random, and some rows with none."""
  allowed = np.random.default_rng(1).random(shape) < 0.35
  allowed[..., 5:9, :] = False
  return masks.from_array(jnp.asarray(allowed))


CHECKS: Final[tuple[Check, ...]] = (
  Check(name="full"),
  Check(name="causal", mask=masks.causal),
  Check(name="causal, H=128", H=128, h=128, T=1024, S=1024, mask=masks.causal),
  Check(name="causal, H=256", H=256, h=256, N=2, K=2, mask=masks.causal),
  Check(name="causal, H=96", H=96, h=96, mask=masks.causal),
  Check(name="causal, float16", H=128, h=128, dtype="float16", mask=masks.causal),
  Check(name="full, H=128, float16", H=128, h=128, dtype="float16"),
  Check(name="odd T and S", T=333, S=517),
  Check(name="odd T and S, causal, H=40, h=72", T=517, S=517, H=40, h=72, mask=masks.causal),
  Check(name="one query", T=1, S=777, mask=lambda: masks.causal(776)),
  Check(name="causal, keys before the queries", T=200, S=456, mask=lambda: masks.causal(256)),
  Check(name="causal, rows that see nothing", T=456, S=200, mask=lambda: masks.causal(-130)),
  Check(name="grouped queries", N=8, K=2, H=128, h=128, mask=masks.causal),
  Check(name="one key head", N=6, K=1, T=400, S=300),
  Check(name="values wider than keys", H=64, h=128, mask=masks.causal),
  Check(name="values narrower than keys", H=192, h=128, N=2, K=2, mask=masks.causal),
  Check(name="window", T=1000, S=1000, mask=lambda: masks.sliding_window(99)),
  Check(name="two-sided window, H=128", H=128, h=128, mask=lambda: masks.sliding_window(70, 33)),
  Check(name="documents", mask=lambda: masks.causal() & masks.segments(_ids(2, 512, 60))),
  Check(
    name="documents, more keys than queries",
    T=130,
    S=390,
    mask=lambda: masks.segments(_ids(2, 130, 40), _ids(2, 390, 120)),
  ),
  Check(name="prefix", mask=lambda: masks.prefix(jnp.asarray([70, 301])) | masks.causal()),
  Check(name="chunked, strided", mask=lambda: masks.chunked(96) | masks.strided(7)),
  Check(name="dense array", T=300, S=300, mask=lambda: _scattered(2, 1, 300, 300)),
  Check(name="dense array of each head", T=200, S=260, mask=lambda: _scattered(1, 4, 200, 260)),
  Check(name="cap", logit_cap=5.0, mask=masks.causal),
  Check(name="ALiBi", alibi=True, T=500, S=500, mask=masks.causal),
  Check(name="sinks", sinks=True, mask=lambda: masks.sliding_window(64)),
  Check(name="bias", T=300, S=410, bias=(2, 4, 300, 410)),
  Check(name="bias of all rows and heads", T=300, S=300, bias=(1, 1, 300, 300), mask=masks.causal),
  Check(name="bias of keys", T=300, S=410, bias=(2, 1, 1, 410)),
  Check(name="bias that pads queries", H=128, h=128, bias=(1, 4, 512, 512), padded=True),
  Check(name="dropout", dropout=0.25, mask=masks.causal),
  Check(
    name="everything at once",
    T=333,
    S=470,
    N=4,
    K=2,
    h=128,
    mask=lambda: masks.sliding_window(150, 20) | masks.prefix(9),
    logit_cap=8.0,
    bias=(1, 4, 333, 470),
    alibi=True,
    sinks=True,
    dropout=0.1,
  ),
  Check(
    name="long, causal, H=128",
    B=1, N=2, K=2, H=128, h=128, T=8192, S=8192, long=True,
    mask=masks.causal,
  ),
  Check(
    name="long, window, documents",
    B=1, N=2, K=1, T=8000, S=8000, long=True,
    mask=lambda: masks.sliding_window(700) & masks.segments(_ids(1, 8000, 1500)),
  ),
)  # fmt: skip


def operands(check: Check) -> dict[str, jax.Array]:
  """Every array that has a gradient, by its name."""
  draw = iter(jax.random.split(jax.random.key(0), 6))
  make = lambda *shape: jax.random.normal(next(draw), shape)
  B, T, S, N, K, H, h = (getattr(check, letter) for letter in "BTSNKHh")
  arrays = {"q": make(B, T, N, H), "k": make(B, S, K, H), "v": make(B, S, K, h)}
  arrays = {name: x.astype(check.dtype) for name, x in arrays.items()}
  if check.bias is not None:
    bias = make(*check.bias)
    arrays["bias"] = bias.at[:, :, ::3].set(-1e9) if check.padded else bias
  if check.alibi:
    arrays["alibi_slopes"] = jnp.exp2(-4.0 - jnp.arange(N, dtype=jnp.float32))
  if check.sinks:
    arrays["sinks"] = make(N)
  return arrays


def program(check: Check, implementation: str) -> Callable[..., dict[str, jax.Array]]:
  """(operands, cotangents) -> the output, the log-sum-exp and every gradient, by name."""
  dropout = make_dropout(check.dropout, jax.random.key(7), check.B, check.N)
  mask = check.mask()

  def attend(arrays):
    q, k, v = (arrays[name] for name in "qkv")
    rest = {name: x for name, x in arrays.items() if name not in ("q", "k", "v")}
    return dot_product_attention(
      q, k, v, mask=mask, logit_cap=check.logit_cap, dropout=dropout, **rest,
      implementation=implementation, return_residual=True,
    )  # fmt: skip

  def run(arrays, cotangents):
    # Of float32 products GPUs keep 11 bits unless they are told otherwise.
    exact = "highest" if arrays["q"].dtype == jnp.float32 else None
    with jax.default_matmul_precision(exact):
      (out, lse), pull = jax.vjp(attend, arrays)
      (gradients,) = pull((cotangents[0].astype(out.dtype), cotangents[1]))
    named = {f"d {name}": x for name, x in gradients.items()}
    return {"out": out, "lse": lse, **named}

  return run


def compiled(check: Check, implementation: str) -> dict[str, Any]:
  """The programs and what they are called with, not yet run: the truth, XLA's answer and ours."""
  arrays = operands(check)
  exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
  keys = jax.random.split(jax.random.key(1))
  shape = (check.B, check.T, check.N)
  cotangents = (
    jax.random.normal(keys[0], (*shape, check.h)).astype(check.dtype).astype(jnp.float32),
    jax.random.normal(keys[1], shape),
  )
  oracle, plain = ("tiled", "tiled") if check.long else ("reference", "xla")
  programs = {"truth": (oracle, exact), "plain": (plain, arrays), "ours": (implementation, arrays)}
  found = {}
  for who, (name, given) in programs.items():
    lowered = jax.jit(program(check, name)).lower(given, cotangents)
    found[who] = (lowered.compile(), (given, cotangents))
  return found


class Judged(Protocol):
  """What `judge` asks of a check."""

  def share(self, name: str) -> float:
    """Of a quantity."""
    ...


def judge(check: Judged, programs: Mapping[str, Any]) -> dict[str, Any]:
  """Runs a compiled check: each quantity's error beside what it may be."""
  answers = []
  for who in ("truth", "plain", "ours", "ours"):
    function, given = programs[who]
    answers.append({name: np.asarray(x) for name, x in function(*given).items()})
  truth, plain, ours, again = answers
  quantities, failed = {}, []
  for name, want in truth.items():
    error, beside = (_error(x[name], want) for x in (ours, plain))
    size = np.max(np.abs(want), where=np.isfinite(want), initial=0.0)
    allowed = 2.0 * beside + check.share(name) * float(max(size, 1e-3))
    quantities[name] = {"error": error, "allowed": allowed}
    if not error <= allowed:
      failed.append(f"{name} is off by {error:.3g}, allowed is {allowed:.3g}")
    if ours[name].tobytes() != again[name].tobytes():
      failed.append(f"{name} is not the same twice")
  return {"quantities": quantities, "failed": failed}


def _error(got: np.ndarray, want: np.ndarray) -> float:
  """The largest difference; infinite where one is infinite, or no number, and the other is not."""
  got, want = (x.astype(np.float64) for x in (got, want))
  finite = np.isfinite(want)
  if not np.array_equal(got[~finite], want[~finite]) or not np.isfinite(got[finite]).all():
    return float("inf")
  return float(np.max(np.abs(got[finite] - want[finite]), initial=0.0))


def main(implementation: str, *names: str) -> None:
  """The checks of these names."""
  serve(implementation, names, CHECKS, compiled)


def serve(
  implementation: str, names: Sequence[str], known: Sequence[Any], compiled: Callable[..., Any]
) -> None:
  """Compiles all side by side, runs them one after the other, and prints."""
  by_name = {check.name: check for check in known}
  # Tracing holds one lock whatever the number of threads: with few of them the first is done soon.
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    tasks = [(name, pool.submit(compiled, by_name[name], implementation)) for name in names]
    for name, task in tasks:
      task.add_done_callback(lambda _, name=name: _tell({"compiled": name}))
    while tasks:
      name, task = tasks.pop(0)
      task.exception()  # waits
      _tell({"started": name})
      try:
        answer = judge(by_name[name], task.result())
      except Exception as problem:  # whatever it is, it is this check's
        answer = {"quantities": {}, "failed": [one_line(problem)]}
      _tell({"name": name} | answer)


def _tell(event: Mapping[str, Any]) -> None:
  """One line, in one piece: threads tell too."""
  sys.stdout.write(json.dumps(event) + "\n")
  sys.stdout.flush()


def run(
  implementation: str,
  names: Sequence[str] | None,
  deadline: float,
  say: Callable[[str], None],
  silence: float = 100.0,
  *,
  known: Sequence[Any] = CHECKS,
  module: str = __name__,
) -> dict[str, Any]:
  """Every check's row, and the verdict: "passed", "failed" or "unfinished".

  Args:
    names: of checks; None is all.
    deadline: `time.monotonic()` after which no check is waited for.
    silence: seconds without a word after which a check counts as one that never ends.
    known: every check that there is.
    module: whose `main` runs them.
  """
  waiting = [check.name for check in known] if names is None else list(names)
  rows: list[dict[str, Any]] = []
  barren = 0  # processes in a row that finished no check
  while waiting and barren < 2 and time.monotonic() < deadline:
    barren += 1
    for row in _process((module, implementation, *waiting), deadline, silence):
      rows.append(row)
      waiting.remove(row["name"])
      barren = 0 if row["quantities"] else barren
      for what in row["failed"]:
        say(f"check failed: {row['name']}: {what}")
  wrong = sum(bool(row["failed"]) for row in rows)
  verdict = "failed" if wrong else "unfinished" if waiting else "passed"
  say(f"checks {verdict}: {len(rows) - wrong} right, {wrong} wrong, {len(waiting)} not run")
  return {"verdict": verdict, "rows": rows, "not_run": waiting}


def _process(words: tuple[str, ...], deadline: float, silence: float) -> Iterator[dict[str, Any]]:
  """The rows of one process, given a module, an implementation and names; the check at which it
  fell silent or ended early is one of them.
  """
  command, waiting = [sys.executable, "-m", *words], list(words[2:])
  lines: queue.Queue[str | None] = queue.Queue()
  with (
    tempfile.TemporaryFile("w+") as said,
    subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True) as process,
  ):
    threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True).start()
    problem = None
    while waiting and problem is None:
      left = deadline - time.monotonic()
      try:
        line = lines.get(timeout=max(0.0, min(silence, left)))
      except queue.Empty:
        problem = f"no answer in {silence:g} s" if silence < left else ""
        continue
      if line is None:
        said.seek(0)
        last = said.read().strip().splitlines()[-1:] or ["without a word"]
        problem = f"its process ended: {last[0]}"
      elif "name" in (event := json.loads(line)):
        waiting.remove(event["name"])
        yield event
      elif "started" in event:
        waiting.insert(0, waiting.pop(waiting.index(event["started"])))
    process.kill()
  if problem:
    yield {"name": waiting[0], "quantities": {}, "failed": [problem]}


def _listen(pipe: Any, lines: "queue.Queue[str | None]") -> None:
  """Hands on what a process prints, and None at its end."""
  for line in pipe:
    lines.put(line)
  lines.put(None)


if __name__ == "__main__":
  main(*sys.argv[1:])
