"""Who is measured in hard-max attention on a chip; `rivals.py` prepares and judges them.

All are forms of `hardmax_attention`: nobody else has one. Keys are normal, so nobody ties.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from attention import plane
from attention.ops.hardmax import hardmax_attention
from experiments.benchmarks import rivals, torch_worker
from experiments.benchmarks.cases import ChipSuite, HardCase
from experiments.benchmarks.contenders import Torch
from experiments.benchmarks.rivals import Inputs, Rival

WORKER: Final = torch_worker.__name__
TORCH: Final[dict[str, str]] = {}
"""Nobody is in torch."""


def absent(name: str, suite: ChipSuite, torch: Torch) -> None:
  """Why a contender cannot take part in any case: never."""
  del name, suite, torch


def rival(name: str, suite: ChipSuite, case: HardCase) -> Rival:
  """The contender of this name."""
  del suite, case
  return Rival(functools.partial(_attend, implementation=name))


def _attend(q, k, v, *, implementation: str) -> jax.Array:
  out: Any = hardmax_attention(q, k, v, is_causal=True, implementation=implementation)
  return out


def inputs(suite: ChipSuite, case: HardCase) -> Inputs:
  """Standard normal inputs of a case."""
  shape = (case.B, case.T, case.N, case.H)
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, d_out = (jax.random.normal(key, shape).astype(suite.dtype) for key in keys)
  rows = np.unique(np.linspace(0, case.T - 1, rivals.ROWS).astype(int))
  truth = _truth(q[:, rows], k, v, jnp.asarray(rows))
  return Inputs((q, k, v, d_out), rows, np.asarray(truth))


@jax.jit
def _truth(q, k, v, rows):
  """The mean of the best keys' values, of some queries, by the equation."""
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  s = plane.scores(q, k)
  s = jnp.where(rows[:, None] >= jnp.arange(k.shape[2])[None], s, -jnp.inf)
  best = (s == s.max(-1, keepdims=True)).astype(v.dtype)
  with jax.default_matmul_precision("highest"):
    out = jnp.einsum("bnqs,bnsh->bqnh", best, v)
  return out / best.sum(-1).swapaxes(1, 2)[..., None]
