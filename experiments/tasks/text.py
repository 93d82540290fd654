"""Bytes of text: predict the next one. No vocabulary to learn, no tokenizer to choose.

    inputs    d e f _ m a i n ( )
    targets   e f _ m a i n ( ) :
    scored    ^ ^ ^ ^ ^ ^ ^ ^ ^ ^

The text is the running Python's standard library, or the files of `data.path`; the loss is read in
bits per byte. Nobody knows what a perfect model scores; unigram, bigram and gzip stand beside it.

Source: Shannon, "Prediction and Entropy of Printed English" (1951); bytes as tokens: Xue et al.,
"ByT5" (2022), https://arxiv.org/abs/2105.13626.
"""

from collections.abc import Sequence
from typing import Protocol

from experiments.data import files, stdlib
from experiments.data.baselines import Baselines
from experiments.data.windows import TrainWindows, ValidWindows
from experiments.tasks.task import Task, check_seed

_VOCAB_SIZE = 256


class DataOptions(Protocol):
  """The `data` part of a run's configuration, as far as it is read here."""

  @property
  def path(self) -> str:
    """Path or glob of the texts; empty for the standard library."""
    ...

  @property
  def valid_fraction(self) -> float:
    """The share of bytes to hold out."""
    ...


def encode(text: str) -> list[int]:
  """The text's bytes in UTF-8."""
  return list(text.encode("utf-8"))


def decode(tokens: Sequence[int]) -> str:
  """The text of these bytes; what is no UTF-8 shows as a replacement character."""
  return bytes(tokens).decode("utf-8", errors="replace")


def make(*, seq_len: int, seed: int, data: DataOptions) -> Task:
  """The byte task at windows of `seq_len` predicted bytes.

  Args:
    seq_len: T.
    seed: Moves the windows from epoch to epoch; their order comes from the pipeline's seed.
    data: Which text, and how much of it to hold out.

  Raises:
    ValueError: No such text, an unreadable or empty one, or one shorter than a window.
  """
  check_seed(seed)
  if data.path:
    corpus = files.load(data.path, valid_fraction=data.valid_fraction)
  else:
    corpus = stdlib.load(valid_fraction=data.valid_fraction)
  return Task(
    name="bytes",
    vocab_size=_VOCAB_SIZE,
    train=TrainWindows(corpus.train, seq_len, seed=seed),
    valid=ValidWindows(corpus.valid, seq_len),
    card=corpus.card,
    optimum=None,
    decode=decode,
    encode=encode,
    baselines=Baselines(corpus.train, corpus.valid),
    bits=True,
    prompt=encode("\n" if data.path else "\ndef "),
  )
