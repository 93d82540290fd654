"""What simple predictors reach on the same split, so that a model's number can be read.

All of them in bits per byte over every held-out byte, predicted in order after one newline:

    unigram   -log2 p(b),      p(b)     = (c(b) + a)    / (sum_b c(b) + 256 a)
    bigram    -log2 p(b | a'), p(b | a') = (c(a' b) + a) / (sum_b c(a' b) + 256 a)
    gzip      8 x the size of the held-out text compressed by itself, in one piece, at level 9,
              header and checksum included, over its size; it has seen no training text

with counts c of the training text and a = 0.1.
"""

import gzip
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int, UInt8

from experiments.data.windows import CONTEXT_BYTE

_SMOOTHING = 0.1
_CHUNK = 1 << 22
"""Pairs counted at a time: memory stays small beside the text."""


class Baselines(Mapping[str, float]):
  """The three numbers by name, worked out when one is first asked for."""

  def __init__(self, train: UInt8[np.ndarray, " n"], valid: UInt8[np.ndarray, " m"]):
    self._train, self._valid = train, valid

  @cached_property
  def _values(self) -> dict[str, float]:
    return bits_per_byte(self._train, self._valid)

  def __getitem__(self, name: str, /) -> float:
    return self._values[name]

  def __iter__(self) -> Iterator[str]:
    return iter(("unigram", "bigram", "gzip"))

  def __len__(self) -> int:
    return 3

  def __repr__(self) -> str:
    return f"Baselines({self._values})"


def bits_per_byte(
  train: UInt8[np.ndarray, " n"], valid: UInt8[np.ndarray, " m"]
) -> dict[str, float]:
  """The table of this module's docstring for one split."""
  counts, scored = _pairs(train), _pairs(valid)
  # Summed over the byte before, pairs are the bytes themselves, the first included.
  return {
    "unigram": _cross_entropy(scored.sum(0), counts.sum(0)),
    "bigram": _cross_entropy(scored, counts),
    "gzip": 8.0 * len(gzip.compress(valid.tobytes(), compresslevel=9, mtime=0)) / valid.size,
  }


def _pairs(text: UInt8[np.ndarray, " n"]) -> Int[np.ndarray, "256 256"]:
  """How often each byte follows each; the first follows a newline."""
  counts = np.zeros(256 * 256, np.int64)
  counts[CONTEXT_BYTE * 256 + int(text[0])] += 1
  for start in range(0, text.size - 1, _CHUNK):
    chunk = text[start : start + _CHUNK + 1].astype(np.int32)
    counts += np.bincount(chunk[:-1] * 256 + chunk[1:], minlength=256 * 256)
  return counts.reshape(256, 256)


def _cross_entropy(
  scored: Int[np.ndarray, "*rows 256"], counts: Int[np.ndarray, "*rows 256"]
) -> float:
  """Mean of -log2 p over the `scored` events, p from the smoothed `counts`."""
  smooth = counts + _SMOOTHING
  log_p: Float[np.ndarray, "*rows 256"] = np.log2(smooth / smooth.sum(-1, keepdims=True))
  return float(-(scored * log_p).sum() / scored.sum())
