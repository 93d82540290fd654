"""Who is measured on a chip: a name and a case -> programs to time, or why there are none.

Whoever runs in this process gives its answer first, some rows of every case; torch gives one to a
short input, under the same mask, in its own process.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention import dot_product_attention
from experiments.benchmarks import timing, torch_worker
from experiments.benchmarks.cases import Case, ChipSuite
from experiments.benchmarks.contenders import FORWARD, Torch
from experiments.benchmarks.timing import Timer

BACKWARD: Final = "backward"
KINDS: Final = (FORWARD, BACKWARD)
# Largest error of an answer that counts as right, as a share of the largest true value.
TOLERANCE: Final[Mapping[str, float]] = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}
WORKER: Final = torch_worker.__name__
ROWS = 16  # queries of each batch row whose answer is looked at
TORCH: Final[Mapping[str, str]] = {
  "torch flash": "FLASH_ATTENTION",
  "torch cuDNN": "CUDNN_ATTENTION",
  "torch efficient": "EFFICIENT_ATTENTION",
  "torch math": "MATH",
}


class Ready(NamedTuple):
  """A contender of one case, ready to be timed."""

  timers: dict[str, Timer]
  """Kind -> timer."""
  refused: dict[str, str]
  """Kind -> why there is none."""
  error: float | None = None
  """Of its answer, as a share of the largest true value."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rival:
  """A function of q, k, v `B T N H`, decays if any, and, by keyword, the arrays that say who may
  attend.
  """

  attend: Callable[..., jax.Array]
  arrays: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  dtype: str | None = None
  """Where it is not the suite's."""
  scaled: bool = False
  """Whether it takes queries that are scaled already."""


def absent(name: str, suite: ChipSuite, torch: Torch) -> str | None:
  """Why a contender cannot take part in any case, or None."""
  if name in TORCH:
    blind = suite.device == "gpu" and not torch.versions.get("devices")
    return torch.absent or (f"torch {torch.versions['torch']} sees no GPU" if blind else None)
  if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
    return "tokamax is not installed (pip install 'frugal-attention[peers]')"
  return None


def rival(name: str, suite: ChipSuite, case: Case) -> Rival:
  """The contender of this name, if it runs in this process."""
  if name == suite.ours:
    return _ours(suite.ours, case)
  if name == "jax mgpu f16":
    return _mgpu(case)
  words, arrays = _words(case)
  if name == "tokamax":
    attend = importlib.import_module("tokamax").dot_product_attention
    choice = "mosaic" if suite.device == "gpu" else "xla_chunked"
  else:
    attend = jax.nn.dot_product_attention
    choice = {"jax cuDNN": "cudnn", "jax XLA": "xla"}[name]
  return Rival(functools.partial(attend, implementation=choice, **words), arrays)


def _words(case: Case) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """The mask as `jax.nn.dot_product_attention` takes it: by name, or as an array where it must."""
  if case.family == "documents":
    return {}, {"mask": jnp.asarray(case.attends(np.arange(case.T)))[None, None]}
  window = {"local_window_size": (case.size - 1, 0)} if case.family == "window" else {}
  return {"is_causal": case.family != "full"} | window, {}


def _ours(implementation: str, case: Case) -> Rival:
  def attend(q, k, v, ids=None):
    mask = case.lowered(ids)
    return dot_product_attention(q, k, v, mask=mask, implementation=implementation)

  packed = case.family == "documents"
  return Rival(attend, {"ids": jnp.asarray(case.documents())[None]} if packed else {})


def _mgpu(case: Case) -> Rival:
  """JAX's own example of a Mosaic GPU kernel: float16, no scale, blocks chosen by hand."""
  library = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
  config = library.TuningConfig(
    block_q=64,
    block_kv={64: 256, 128: 128}.get(case.H, 64),
    max_concurrent_steps=2,
    causal=case.family == "causal",
    block_q_dkv=64,
    block_kv_dkv=64,
    block_q_dq=64,
    block_kv_dq=64,
  )
  attend = lambda q, k, v: library.attention(q, k, v, config)
  return Rival(attend, dtype="float16", scaled=True)


class Inputs(NamedTuple):
  """What every contender of a case is given, and the truth about some rows."""

  arrays: tuple[jax.Array, ...]
  """q, k, v, decays if any, and the output's cotangent."""
  rows: np.ndarray
  truth: np.ndarray
  """float32 `B rows N H`."""


def inputs(suite: ChipSuite, case: Case) -> Inputs:
  """Standard normal inputs of a case."""
  shape = (case.B, case.T, case.N, case.H)
  q, k, v, d_out = (
    _draw(key, shape, suite.dtype) for key in jax.random.split(jax.random.key(0), 4)
  )
  rows = np.unique(np.linspace(0, case.T - 1, ROWS).astype(int))
  truth = _truth(q[:, rows], k, v, jnp.asarray(case.attends(rows)))
  return Inputs((q, k, v, d_out), rows, np.asarray(truth))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jax.random.normal(key, shape).astype(dtype)


@jax.jit
def _truth(q, k, v, attends):
  """Attention of some queries, by the equation."""
  with jax.default_matmul_precision("highest"):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    score = jnp.einsum("bqnh,bsnh->bnqs", q, k) * q.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(attends, score, -jnp.inf), axis=-1)
    return jnp.einsum("bnqs,bsnh->bqnh", p, v)


def one_line(problem: BaseException) -> str:
  """What went wrong, short enough for a table."""
  text = " ".join(f"{type(problem).__name__}: {problem}".split())
  return text if len(text) <= 300 else text[:297] + "..."


def error(out: np.ndarray, truth: np.ndarray) -> float:
  """The largest difference `B rows N H`, each as a share of the largest true value of its row."""
  size = np.max(np.abs(truth), axis=(2, 3), keepdims=True)
  return float(np.max(np.abs(out - truth) / size))  # NaN stays NaN


def prepare(contender: Rival, given: Inputs) -> Ready:
  """Compiles and runs both passes once. Whatever a contender fails with is why it is refused."""
  q, *others, d_out = (x.astype(contender.dtype or x.dtype) for x in given.arrays)
  q = q * q.shape[-1] ** -0.5 if contender.scaled else q
  forward = jax.jit(lambda operands, arrays: contender.attend(*operands, **arrays))
  arguments = (q, *others), contender.arrays
  try:
    out = np.asarray(forward(*arguments)[:, given.rows], np.float32)
  except Exception as problem:
    return Ready({}, dict.fromkeys(KINDS, one_line(problem)))
  timers = {FORWARD: timing.queue_timer(forward, arguments)}
  try:
    timers[BACKWARD] = _backward_timer(contender, arguments, d_out)
  except Exception as problem:
    return Ready(timers, {BACKWARD: one_line(problem)}, error(out, given.truth))
  return Ready(timers, {}, error(out, given.truth))


def _backward_timer(contender: Rival, arguments: tuple[Any, ...], d_out: jax.Array) -> Timer:
  """The backward pass alone: what the forward pass leaves for it stays on the device."""

  def start(operands, arrays):
    return jax.vjp(lambda *given: contender.attend(*given, **arrays), *operands)[1]

  pull_back = jax.jit(lambda pull, d_out: pull(d_out))
  pull = jax.jit(start)(*arguments)
  jax.block_until_ready(pull_back(pull, d_out))
  return timing.queue_timer(pull_back, (pull, d_out))


def prepare_torch(
  names: Sequence[str], suite: ChipSuite, case: Case, torch: Torch
) -> dict[str, Ready]:
  """The same of torch's backends. Their answers are those to the first tokens of the case."""
  short = dataclasses.replace(case, B=1, T=min(case.T, 512))
  given = inputs(dataclasses.replace(suite, dtype="float32"), short)
  every = jnp.asarray(short.attends(np.arange(short.T)))
  truth = np.asarray(_truth(*given.arrays[:3], every))
  found: dict[str, Ready] = {}
  try:
    _use_torch(suite, short, torch)
    torch.hand_over(given.arrays)
    for name in names:
      found[name] = _torch_answer(name, truth, torch)
    _use_torch(suite, case, torch)
    torch.ask("make", shape=[case.B, case.T, case.N, case.H])
  except RuntimeError as problem:
    return {name: Ready({}, dict.fromkeys(KINDS, one_line(problem))) for name in names}
  for name, ready in found.items():
    for kind in KINDS if not ready.refused else ():
      timer = functools.partial(_torch_time, torch, kind, TORCH[name])
      try:
        timer(1)
        ready.timers[kind] = timer
      except RuntimeError as problem:
        ready.refused[kind] = one_line(problem)
  return found


def _torch_answer(name: str, truth: np.ndarray, torch: Torch) -> Ready:
  try:
    answer = torch.answer(truth.shape, backend=TORCH[name])
  except RuntimeError as problem:
    return Ready({}, dict.fromkeys(KINDS, one_line(problem)))
  return Ready({}, {}, error(answer, truth))


def _use_torch(suite: ChipSuite, case: Case, torch: Torch) -> None:
  torch.ask(
    "use",
    device="cuda" if suite.device == "gpu" else "cpu",
    dtype=suite.dtype,
    mask=case.mask,
    documents=case.documents().tolist(),
  )


def _torch_time(torch: Torch, kind: str, backend: str, repeats: int) -> float:
  return torch.ask("time", kind=kind, backend=backend, repeats=repeats)["seconds"]
