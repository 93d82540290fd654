"""From documents to a corpus: duplicates out, a split that does not move, a card that says so."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from experiments.data.card import DataCard

_SALT = "held out 41:"
"""Prefix of a document's name in the hash that decides its side of the split.

The number was chosen, once, so that a tenth of the standard library's files is also a tenth of its
bytes, and of its largest package's, and no single file is most of it.
"""

_TOLERANCE = 2.0
"""A split by file stands when the held-out share is within this factor of the wish."""


class Document(NamedTuple):
  """One text: a name that does not depend on the machine, and its bytes."""

  name: str
  data: bytes


class Corpus(NamedTuple):
  """Text in two parts, as bytes, with its card."""

  train: UInt8[np.ndarray, " bytes"]
  valid: UInt8[np.ndarray, " bytes"]
  card: DataCard


class _Split(NamedTuple):
  train: list[bytes]
  valid: list[bytes]
  rule: str


def build(
  documents: Iterable[Document],
  *,
  valid_fraction: float,
  name: str,
  description: str,
  licence: str,
  origin: str,
  version: str | None = None,
) -> Corpus:
  """Sorts the documents by name, drops exact duplicates, splits them, and writes the card.

  The result depends on the names and contents alone, not on the order of `documents`. Within a
  part the documents follow each other in the order of their names, with nothing between them.

  Args:
    documents: The texts; empty ones are dropped.
    valid_fraction: The share of bytes to hold out, between 0 and 1.
    name, description, licence, origin, version: For the card; `version` None means the first
      twelve digits of the hash.

  Raises:
    ValueError: No text at all, or a fraction that is not between 0 and 1.
  """
  if not 0.0 < valid_fraction < 1.0:
    raise ValueError(f"data.valid_fraction must lie between 0 and 1, got {valid_fraction}")
  kept = _unique(documents)
  if not kept:
    raise ValueError(f"the data {name!r} holds no text: every document is empty")
  parts = _split(kept, valid_fraction)
  train, valid = (np.frombuffer(b"".join(part), np.uint8) for part in (parts.train, parts.valid))
  digest = _digest(kept)
  card = DataCard(
    name=name,
    description=description,
    licence=licence,
    origin=origin,
    sha256=digest,
    files=len(kept),
    bytes=sum(len(document.data) for document in kept),
    train_bytes=train.size,
    valid_bytes=valid.size,
    split=parts.rule,
    version=digest[:12] if version is None else version,
  )
  return Corpus(train, valid, card)


def _name_bytes(name: str) -> bytes:
  # A file name may hold bytes that are no UTF-8; Python keeps them as surrogates.
  return name.encode("utf-8", "surrogateescape")


def _unique(documents: Iterable[Document]) -> list[Document]:
  """The documents that are not empty, by name; of equal contents the first name stays."""
  seen: dict[bytes, Document] = {}
  for document in sorted(documents, key=lambda document: _name_bytes(document.name)):
    if document.data:
      seen.setdefault(hashlib.sha256(document.data).digest(), document)
  return list(seen.values())


def _digest(documents: Sequence[Document]) -> str:
  """sha256 over names, sizes and contents, so that moving a boundary changes it."""
  digest = hashlib.sha256()
  for name, data in documents:
    digest.update(_name_bytes(name) + b"\0" + str(len(data)).encode() + b"\0")
    digest.update(data)
  return digest.hexdigest()


def _held_out(name: str, fraction: float) -> bool:
  """Whether a document is held out: decided by its name alone, whatever else there is."""
  digest = hashlib.sha256(_name_bytes(_SALT + name)).digest()
  return int.from_bytes(digest[:8]) < fraction * 2**64


def _split(documents: Sequence[Document], fraction: float) -> _Split:
  """By file, or, where the files are too few or too uneven for that, by position in each file."""
  valid = [data for name, data in documents if _held_out(name, fraction)]
  total = sum(len(data) for _, data in documents)
  share = sum(map(len, valid)) / total
  low, high = fraction / _TOLERANCE, min(fraction * _TOLERANCE, (1.0 + fraction) / 2.0)
  if low <= share <= high:
    train = [data for name, data in documents if not _held_out(name, fraction)]
    rule = f"by file: held out where sha256({_SALT!r} + name) falls in the lowest {fraction:g}"
    return _Split(train, valid, rule)
  cuts = [len(data) - round(len(data) * fraction) for _, data in documents]
  return _Split(
    [data[:cut] for (_, data), cut in zip(documents, cuts, strict=True)],
    [data[cut:] for (_, data), cut in zip(documents, cuts, strict=True)],
    f"by position: the last {fraction:g} of each file, as the files are too few or too uneven",
  )
