"""Suites as data: which contenders are measured, at which lengths, and how often."""

import dataclasses
from collections.abc import Mapping
from typing import Final

K = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
  """One benchmark: B=1, causal, float32, standard normal, a key head for each query head."""

  heads: int
  head_dim: int
  cores: int
  """Processor cores that are used of those that there are; 0 is all."""
  rounds: int
  """Rounds in which every contender of one length is timed once."""
  few_rounds: int
  """The same, from `long` tokens on."""
  long: int = 16 * K
  lengths: Mapping[str, tuple[int, ...]]
  """Contender -> the lengths T at which its forward, and its forward and backward, are timed."""
  memory: Mapping[str, tuple[int, ...]]
  """Contender -> the lengths at which its peak memory is measured, in a process each."""
  steps: Mapping[str, tuple[int, ...]]
  """Contender -> the numbers of past tokens after which one decoding step is timed."""
  every_variant: tuple[int, ...]
  """Lengths at which every entry of VARIANTS is timed, with its default options."""


SUITES: Final[Mapping[str, Suite]] = {
  "cpu": Suite(
    heads=8,
    head_dim=64,
    cores=2,
    rounds=9,
    few_rounds=5,
    lengths={
      "jax.nn": (K, 2 * K, 4 * K),
      "tokamax": (K, 2 * K, 4 * K),
      "torch": (K, 2 * K, 4 * K, 8 * K, 16 * K),
      "tiled": (K, 2 * K, 4 * K, 8 * K, 16 * K),
      "tiled, a device per core": (K, 2 * K, 4 * K, 8 * K, 16 * K),
      "tiled, window 256": (K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K),
      "linear": (K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K),
      "linear, elu+1": (K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K),
      "linear, a device per core": (K, 4 * K, 16 * K),
      "fla": (K, 4 * K, 16 * K),
      "recurrence": (K, 4 * K, 16 * K),
    },
    memory={
      "jax.nn": (K, 4 * K),
      "tokamax": (K, 4 * K),
      "torch": (K, 4 * K, 16 * K),
      "tiled": (K, 4 * K, 16 * K),
      "tiled, window 256": (K, 4 * K, 16 * K, 64 * K),
      "linear": (K, 4 * K, 16 * K, 64 * K),
      "linear, elu+1": (K, 4 * K, 16 * K, 64 * K),
    },
    steps={
      "linear": (K, 4 * K, 16 * K, 64 * K),
      "linear, elu+1": (K, 4 * K, 16 * K, 64 * K),
      "tiled": (K, 4 * K, 16 * K),
      "tiled, window 256": (K, 4 * K, 16 * K, 64 * K),
    },
    every_variant=(K, 4 * K),
  ),
  "toy": Suite(
    heads=2,
    head_dim=8,
    cores=0,
    rounds=3,
    few_rounds=2,
    long=128,
    lengths={
      "jax.nn": (128,),
      "tokamax": (128,),
      "torch": (128,),
      "fla": (128,),
      "tiled": (128,),
      "tiled, a device per core": (128,),
      "linear": (64, 128),
      "recurrence": (128,),
      "variant gated_linear": (64,),
    },
    memory={"torch": (128,), "tiled": (128,)},
    steps={"linear": (64, 128), "tiled": (64,)},
    every_variant=(),
  ),
}
