"""What a task is, and how the generated ones draw their records."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from experiments.data.card import DataCard
from experiments.data.source import Record, Source

TRAIN_RECORDS = 2**31 - 1
"""Records of a generated training split: more than any run reads."""

VALID_RECORDS = 4096
"""Records of a generated held-out split."""

_TRAIN, _VALID = 0, 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
  """Something to learn: records to train on, records to be judged by, and how to read them.

  Attributes:
    name: As `make_task` takes it.
    vocab_size: Tokens are integers below it.
    train: Training records.
    valid: Held-out records.
    card: What the data is.
    optimum: Mean loss in nats per scored token of a perfect predictor, where it is known.
    decode: Tokens to text for people.
    encode: Text to tokens; the inverse of `decode` on what `decode` prints.
    baselines: What simple predictors reach, in bits per byte (per token for a generated task).
    bits: Whether a loss is best read as bits per byte or token.
    prompt: Tokens that a sample starts from.
  """

  name: str
  vocab_size: int
  train: Source
  valid: Source
  card: DataCard
  optimum: float | None
  decode: Callable[[Sequence[int]], str]
  encode: Callable[[str], list[int]]
  baselines: Mapping[str, float]
  bits: bool
  prompt: list[int]


@dataclasses.dataclass(frozen=True)
class Generated:
  """Records drawn on demand: record i is a pure function of (seed, split, i).

  Each record has a random stream of its own (Philox, a counter under the key (seed, split, i)), so
  that no stream of the training split is one of the held-out split, under this seed or another.
  """

  draw: Callable[[np.random.Generator], Record]
  seed: int
  split: int
  length: int

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int, /) -> Record:
    if not 0 <= index < self.length:
      raise IndexError(f"record {index} of a source with {self.length} records")
    key = np.array([2 * self.seed + self.split, index], np.uint64)
    return self.draw(np.random.Generator(np.random.Philox(key=key)))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A name for each token, to print and to parse."""

  names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.names)

  def decode(self, tokens: Sequence[int]) -> str:
    """The names, with spaces between them."""
    return " ".join(self.names[token] for token in tokens)

  def encode(self, text: str) -> list[int]:
    """The tokens whose names stand in `text`.

    Raises:
      ValueError: A word that names no token.
    """
    index = {name: token for token, name in enumerate(self.names)}
    for word in text.split():
      if word not in index:
        few = " ".join(self.names[:8])
        raise ValueError(f"{word!r} is none of the {len(self)} tokens ({few} ... {self.names[-1]})")
    return [index[word] for word in text.split()]


def letters(count: int) -> tuple[str, ...]:
  """Names for `count` symbols: a to z as far as they reach, then s26, s27, ..."""
  return tuple(chr(ord("a") + i) if i < 26 else f"s{i}" for i in range(count))


def as_record(tokens: Int[np.ndarray, " T+1"], scored: slice) -> Record:
  """A record from a sequence; `scored` selects those of its tokens that are to be predicted."""
  weights = np.zeros(tokens.size, np.float32)
  weights[scored] = 1.0
  tokens = tokens.astype(np.int32)
  return {"inputs": tokens[:-1], "targets": tokens[1:], "weights": weights[1:]}


def check_seed(seed: int) -> None:
  """Refuses a seed that does not fit the key of a stream.

  Raises:
    ValueError: Naming the seed.
  """
  if not 0 <= seed < 2**63:
    raise ValueError(f"seed must lie in [0, 2**63), got {seed}")


def check_count(value: int, low: int, *, what: str) -> None:
  """Refuses a count below `low`.

  Raises:
    ValueError: Naming both.
  """
  if value < low:
    raise ValueError(f"{what} must be at least {low}, got {value}")


def generated_task(
  name: str,
  *,
  draw: Callable[[np.random.Generator], Record],
  vocabulary: Vocabulary,
  seed: int,
  description: str,
  settings: Mapping[str, object],
  baselines: Mapping[str, float],
  optimum: float = 0.0,
  bits: bool = False,
) -> Task:
  """The task whose records `draw` makes from a random stream.

  Args:
    name: The task's name.
    draw: Makes a record; all records have the same shapes.
    vocabulary: The tokens' names.
    seed: Selects the records, in both splits.
    description: For the card.
    settings: Whatever else decides the records (lengths, sizes); goes into the card's hash.
    baselines: What simple predictors reach, in bits per scored token.
    optimum: Loss of a perfect predictor, nats per scored token.
    bits: Whether to report bits per token.
  """
  check_seed(seed)
  train = Generated(draw, seed, _TRAIN, TRAIN_RECORDS)
  valid = Generated(draw, seed, _VALID, VALID_RECORDS)
  identity = json.dumps({"task": name, "version": 1, "seed": seed, **settings}, sort_keys=True)
  card = DataCard(
    name=name,
    description=description,
    licence="CC0-1.0",
    origin=f"generated: {identity}",
    sha256=hashlib.sha256(identity.encode()).hexdigest(),
    files=0,
    bytes=0,
    train_bytes=0,
    valid_bytes=0,
    split=f"by random stream: {TRAIN_RECORDS} training records, {VALID_RECORDS} held out",
    version="1",
  )
  return Task(
    name=name,
    vocab_size=len(vocabulary),
    train=train,
    valid=valid,
    card=card,
    optimum=optimum,
    decode=vocabulary.decode,
    encode=vocabulary.encode,
    baselines=baselines,
    bits=bits,
    prompt=_prompt(valid[0]),
  )


def _prompt(record: Record) -> list[int]:
  """The inputs up to where the first answer is due."""
  first = int(np.flatnonzero(record["weights"])[0])
  return [int(token) for token in record["inputs"][: first + 1]]
