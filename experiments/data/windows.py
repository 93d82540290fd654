"""Byte text as records: windows of T + 1 bytes, T of them predicted."""

import dataclasses
from typing import Self

import numpy as np
from jaxtyping import UInt8

from experiments.data.source import Record

CONTEXT_BYTE = ord("\n")
"""What stands before the first byte of a held-out text, so that this byte is predicted too."""


def check_length(size: int, seq_len: int, *, what: str) -> None:
  """Refuses a text that does not fill one window.

  Raises:
    ValueError: Naming both lengths.
  """
  if seq_len < 1:
    raise ValueError(f"seq_len must be at least 1, got {seq_len}")
  if size < seq_len + 1:
    raise ValueError(
      f"the {what} text has {size} bytes, fewer than one window of seq_len + 1 = {seq_len + 1}; "
      "give more text, a shorter seq_len or another data.valid_fraction"
    )


def _record(window: np.ndarray, scored: int) -> Record:
  tokens = window.astype(np.int32)
  weights = np.ones(tokens.size - 1, np.float32)
  weights[scored:] = 0.0
  return {"inputs": tokens[:-1], "targets": tokens[1:], "weights": weights}


def _checked(index: int, length: int) -> int:
  # IndexError, not modulo: Python's `for record in source` ends by it.
  if not 0 <= index < length:
    raise IndexError(f"record {index} of a source with {length} records")
  return index


class TrainWindows:
  """Windows side by side: record i predicts bytes [i T + 1, i T + T] of the text.

  An epoch predicts every byte once, but for fewer than T. Each epoch after the first cuts the text
  at other places: all windows move by an offset drawn from (seed, epoch), and the one that meets
  the end of the text goes on at its beginning.
  """

  def __init__(
    self, text: UInt8[np.ndarray, " bytes"], seq_len: int, *, seed: int = 0, offset: int = 0
  ):
    check_length(text.size, seq_len, what="training")
    self._text, self._seq_len, self._seed, self._offset = text, seq_len, seed, offset

  def __len__(self) -> int:
    return (self._text.size - 1) // self._seq_len

  def __getitem__(self, index: int, /) -> Record:
    start = (self._offset + _checked(index, len(self)) * self._seq_len) % self._text.size
    stop = start + self._seq_len + 1
    window = self._text[start:stop]
    if stop > self._text.size:
      window = np.concatenate([window, self._text[: stop - self._text.size]])
    return _record(window, self._seq_len)

  def epoch(self, number: int) -> Self:
    """The same text, cut at the places of epoch `number`."""
    offset = 0
    if number:
      offset = int(np.random.default_rng([self._seed, number]).integers(self._seq_len))
    return type(self)(self._text, self._seq_len, seed=self._seed, offset=offset)


@dataclasses.dataclass(frozen=True)
class ValidWindows:
  """A held-out text in order, every byte predicted exactly once.

  Record i predicts bytes [i T, i T + T). Before the first byte stands a newline; the last window
  is filled up with zeros of weight 0. The weights add up to the size of the text, so that a sum
  of losses over the source divided by the sum of weights is the loss per byte, exactly.
  """

  text: UInt8[np.ndarray, " bytes"]
  seq_len: int

  def __post_init__(self):
    check_length(self.text.size, self.seq_len, what="held-out")

  def __len__(self) -> int:
    return -(-self.text.size // self.seq_len)

  def __getitem__(self, index: int, /) -> Record:
    start = _checked(index, len(self)) * self.seq_len
    targets = self.text[start : start + self.seq_len]
    window = np.zeros(self.seq_len + 1, np.uint8)
    window[0] = self.text[start - 1] if start else CONTEXT_BYTE
    window[1 : 1 + targets.size] = targets
    return _record(window, targets.size)
