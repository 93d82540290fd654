"""Training that ends hard: how sharp a softmax must be to stand for hard-max attention, and the way
there.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array

from attention import shapes


def harden(step: int | Array, steps: int, *, start: float = 1.0, end: float) -> Array:
  """The inverse temperature at a step of annealed training: geometric from `start` to `end`.

  Scores times this, through a softmax, are hard-max attention at the end if `end` is at least
  `sharpness(S, margin, error)`. Any of them may be traced.

  Raises: ValueError: `steps`, `start` or `end` is not above 0.
  """
  for name, value in (("steps", steps), ("start", start), ("end", end)):
    shapes.check_positive(name, value)
  done = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
  return start * (end / start) ** done


def sharpness(num_keys: int, margin: float, error: float) -> float:
  """The inverse temperature at which softmax gives all but `error` to the best key.

      1 - p_best <= (S - 1) e^(-beta margin) <= error    for    beta = ln((S - 1) / error) / margin

  where every other score is at least `margin` below the best.

  Raises: ValueError: a number that is not above 0, or an error of 1 or more.
  """
  for name, value in (("num_keys", num_keys), ("margin", margin), ("error", error)):
    shapes.check_positive(name, value)
  if error >= 1:
    raise ValueError(f"error must be less than 1, not {error}")
  return math.log(max(num_keys - 1, 1) / error) / margin
