"""What the tests of hard-max attention share: keys that are hard, and a dense scan in NumPy."""

from typing import NamedTuple

import numpy as np

FAMILIES = ("gaussian", "parabola", "circle", "grid", "collinear")


class Answer(NamedTuple):
  """Of each query of one head."""

  score: np.ndarray  # T: the best score
  count: np.ndarray  # T: how many keys have it
  last: np.ndarray  # T: the last of them
  tied: np.ndarray  # T S, bool: which they are

  def average(self, v):
    """The mean of the winners' values, float64."""
    return self.tied @ v.astype(np.float64) / self.count[:, None]

  def average_gradient(self, g):
    """What the values get."""
    return (self.tied / self.count[:, None]).T @ g.astype(np.float64)


def planar(family: str, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Queries and keys `length 2`, float32. Some queries of every family look along an axis, or
  nowhere. The parabola, the grid and the lines are made of integers, so their scores are exact.
  """
  rng = np.random.default_rng([seed, FAMILIES.index(family)])
  if family == "gaussian":
    q, k = rng.normal(size=(2, length, 2))
  elif family == "parabola":
    i = rng.integers(-300, 301, length)
    q = np.stack([rng.integers(-300, 301, length), np.ones(length)], 1)
    k = np.stack([2 * i, -(i**2)], 1)
  elif family == "circle":
    turn = rng.uniform(0, 2 * np.pi, (2, length))
    q, k = np.stack([np.cos(turn), np.sin(turn)], -1)
  elif family == "grid":
    q, k = rng.integers(-4, 5, (2, length, 2))
  else:
    q = rng.integers(-3, 4, (length, 2))
    along = np.array([[1, 2], [3, -1], [0, 1], [1, 0]])[rng.integers(0, 4, length)]
    k = rng.integers(-20, 21, (length, 1)) * along + rng.integers(0, 2, (length, 2))
  q = q.astype(np.float32)
  for i, fixed in enumerate(((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))):
    q[7 + 3 * i :: 31] = fixed
  return q, k.astype(np.float32)


def scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
  """In the dtype of the inputs, every product rounded, added in order: `T S`."""
  s = q[:, None, 0] * k[None, :, 0]
  for c in range(1, q.shape[1]):
    s = s + q[:, None, c] * k[None, :, c]
  return s


def scan(q: np.ndarray, k: np.ndarray, causal: bool = True) -> Answer:
  """Every query by all of its scores."""
  s = scores(q, k)
  seen = np.tri(*s.shape, dtype=bool) if causal else np.ones(s.shape, bool)
  s = np.where(seen, s, -np.inf)
  score = s.max(1)
  tied = s == score[:, None]
  last = np.where(tied, np.arange(len(k)), -1).max(1)
  return Answer(score, tied.sum(1), last, tied)


def relative_regret(q: np.ndarray, k: np.ndarray, chosen: np.ndarray, causal: bool = True) -> float:
  """By how much the chosen keys' scores miss the best ones in float64, over the size of the
  greatest terms.
  """
  q, k = q.astype(np.float64), k.astype(np.float64)
  lost = scan(q, k, causal).score - (q * k[chosen]).sum(1)
  return float(lost.max() / (np.abs(q).sum(1).max() * np.abs(k).max()))
