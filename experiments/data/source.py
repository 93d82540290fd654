"""What a data source is: a length, and a record for every index."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

type Record = Mapping[str, np.ndarray]
"""One example: "inputs" int32 [T], "targets" int32 [T] (the next token), "weights" float32 [T].

A position of weight 0 is not scored.
"""


class Source(Protocol):
  """Records by index: the same index always gives the same record."""

  def __len__(self) -> int:
    """The number of records."""
    ...

  def __getitem__(self, index: int, /) -> Record:
    """The record at `index`, 0 <= index < len(self); IndexError beyond."""
    ...


@runtime_checkable
class EpochSource(Source, Protocol):
  """A source that can be read differently in every epoch, e.g. cut at other places."""

  def epoch(self, number: int) -> Source:
    """The source as it reads in epoch `number`; it has the same length in all of them."""
    ...
