"""Who is measured in linear attention on a chip; `rivals.py` prepares and judges them.

Decays are log sigmoids of normal numbers and outputs are scaled by H^-0.5, as in the benchmarks of
flash-linear-attention. Everybody's answer to some tokens of every case, torch's to a short input,
is held to the recurrence in float32.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from attention import linear_attention
from experiments.benchmarks import rivals, torch_linear
from experiments.benchmarks.cases import ChipSuite, LinearCase
from experiments.benchmarks.contenders import Torch
from experiments.benchmarks.rivals import KINDS, Inputs, Ready, Rival, one_line

WORKER: Final = torch_linear.__name__
TORCH: Final = {"fla": "fla", "torch recurrence": "recurrence"}
OURS: Final = {"hopper": "hopper", "chunked": "chunked", "recurrence": "reference"}
SHORT = 512  # tokens of torch's answer


def absent(name: str, suite: ChipSuite, torch: Torch) -> str | None:
  """Why a contender cannot take part in any case, or None."""
  if name in TORCH:
    if torch.absent or name != "fla":
      return torch.absent
    if not torch.versions.get("fla"):
      return "fla is not installed beside torch (pip install flash-linear-attention)"
    return None if torch.versions.get("devices") else "fla's kernels need a GPU that torch sees"
  if name == "jax-linear-attention" and importlib.util.find_spec("jla") is None:
    return "jax-linear-attention is not installed (pip install --no-deps jax-linear-attention)"
  return None


def rival(name: str, suite: ChipSuite, case: LinearCase) -> Rival:
  """The contender of this name, if it runs in this process."""
  del suite
  scale = case.H**-0.5
  if name != "jax-linear-attention":
    return Rival(functools.partial(_attend, scale=scale, implementation=OURS[name]))
  library = importlib.import_module("jla.ops")
  kind = "gla" if case.decay == "channel" else "simple_gla"
  run = functools.partial(library.linear_attention, kind, impl="mosaic_gpu", scale=scale)
  return Rival(lambda q, k, v, g: run(q, k, v, g=g)[0])


def _attend(q, k, v, g, *, scale: float, implementation: str) -> jax.Array:
  out: Any = linear_attention(q, k, v, log_decay=g, scale=scale, implementation=implementation)
  return out


def inputs(suite: ChipSuite, case: LinearCase) -> Inputs:
  """Inputs of a case."""
  shape = (case.B, case.T, case.N, case.H)
  decays = shape if case.decay == "channel" else shape[:-1]
  *keys, last = jax.random.split(jax.random.key(0), 5)
  q, k, v, d_out = (_normal(key, shape, suite.dtype) for key in keys)
  g = _log_sigmoid(last, decays)
  rows = np.unique(np.linspace(0, case.T - 1, rivals.ROWS).astype(int))
  truth = _truth(q, k, v, g, jnp.asarray(rows))
  return Inputs((q, k, v, g, d_out), rows, np.asarray(truth))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jax.random.normal(key, shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _log_sigmoid(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.nn.log_sigmoid(jax.random.normal(key, shape))


@jax.jit
def _truth(q, k, v, g, rows):
  """The recurrence, some tokens of it."""
  with jax.default_matmul_precision("highest"):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    out = _attend(q, k, v, g, scale=q.shape[-1] ** -0.5, implementation="reference")
    return out[:, rows]


def prepare_torch(
  names: Sequence[str], suite: ChipSuite, case: LinearCase, torch: Torch
) -> dict[str, Ready]:
  """Those in torch, ready to be timed."""
  short = dataclasses.replace(case, B=1, T=min(case.T, SHORT))
  given = inputs(dataclasses.replace(suite, dtype="float32"), short)
  *operands, _ = given.arrays
  truth: Any = np.asarray(_truth(*operands, jnp.arange(short.T)))
  device = "cuda" if suite.device == "gpu" else "cpu"
  use = functools.partial(torch.ask, "use", device=device, dtype=suite.dtype, decay=case.decay)
  found: dict[str, Ready] = {}
  try:
    use()
    torch.hand_over(given.arrays, torch_linear.NAMES)
    for name in names:
      answer = torch.answer(truth.shape, backend=TORCH[name])
      found[name] = Ready({}, {}, rivals.error(answer, truth))
    use()
    torch.ask("make", shape=[case.B, case.T, case.N, case.H])
    for name, ready in found.items():
      ready.timers.update({kind: _timer(torch, kind, TORCH[name]) for kind in KINDS})
      for timer in ready.timers.values():
        timer(1)  # its kernels are compiled
  except RuntimeError as problem:
    return {name: Ready({}, dict.fromkeys(KINDS, one_line(problem))) for name in names}
  return found


def _timer(torch: Torch, kind: str, backend: str) -> Any:
  ask = functools.partial(torch.ask, "time", kind=kind, backend=backend)
  return lambda repeats: ask(repeats=repeats)["seconds"]
