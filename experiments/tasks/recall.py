"""Multi-query associative recall (MQAR): pairs of key and value, then the keys again.

    inputs    k4 v9 k2 v7 | k2  .  k4  .   .   .        (no bar in the data; . is filler)
    targets                 v7  .  v9  .   .   .
    scored                  ^      ^

With P pairs in T tokens: keys and values come from the lower and the upper half of the vocabulary,
each drawn without repetition; the pairs fill tokens 0 to 2P - 1. Each key is asked once, at token
2P + 2g for a gap g of its own out of (T - 2P) / 2, drawn without repetition with

    p(g) ~ (g + 1)^(a - 1),  a = 0.01

so that most questions come soon and some late, as repeated bigrams do in text. The answer is scored
where the key stands and is not fed in. All other tokens after the pairs are filler: uniform over
the whole vocabulary (random_non_queries), or token 0. A perfect model scores 0 nats: the pairs
always tell; chance is log(vocab_size / 2).

Source: Arora, Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language
Models" (2023), https://arxiv.org/abs/2312.04927, as its code draws it (multiquery_ar in
github.com/HazyResearch/zoology), with its vocabulary of 8192.
"""

import math

import numpy as np
from jaxtyping import Float

from experiments.data.source import Record
from experiments.tasks.task import Task, Vocabulary, check_count, generated_task


def make(
  *,
  seq_len: int,
  seed: int,
  pairs: int | None = None,
  vocab_size: int = 8192,
  power_a: float = 0.01,
  random_non_queries: bool = True,
) -> Task:
  """The recall task at `seq_len` tokens.

  Args:
    seq_len: T, even.
    seed: Selects the records.
    pairs: P; None means a sixteenth of `seq_len` as in the paper's shortest settings, at least 1.
    vocab_size: Keys are 1 to half of it, values the other half.
    power_a: a; 1 spreads the questions evenly.
    random_non_queries: Fill with random tokens rather than with zeros.

  Raises:
    ValueError: An odd length, or one too short for the pairs and their questions; too few tokens
      for the pairs.
  """
  pairs = max(1, seq_len // 16) if pairs is None else pairs
  check_count(pairs, 1, what="recall:pairs")
  check_count(seq_len, 4 * pairs, what=f"seq_len for the task recall with {pairs} pairs")
  if seq_len % 2:
    raise ValueError(f"seq_len for the task recall must be even, got {seq_len}")
  half = vocab_size // 2
  check_count(vocab_size, 2 * (pairs + 1), what=f"recall:vocab_size with {pairs} pairs")
  if not power_a > 0:
    raise ValueError(f"recall:power_a must be positive, got {power_a}")
  gap_p = _gap_probabilities((seq_len - 2 * pairs) // 2, power_a)

  def draw(random: np.random.Generator) -> Record:
    keys = 1 + random.choice(half - 1, size=pairs, replace=False)
    values = half + random.choice(vocab_size - half, size=pairs, replace=False)
    # The order of exponential arrivals at rates p is the order of draws by p without repetition.
    arrival = random.standard_exponential(gap_p.size) / gap_p
    places = 2 * pairs + 2 * np.argsort(arrival)[:pairs]
    inputs = np.zeros(seq_len, np.int32)
    if random_non_queries:
      inputs[:] = random.integers(vocab_size, size=seq_len)
    inputs[0 : 2 * pairs : 2] = keys
    inputs[1 : 2 * pairs : 2] = values
    inputs[places] = keys
    targets = np.zeros(seq_len, np.int32)
    targets[places] = values
    weights = np.zeros(seq_len, np.float32)
    weights[places] = 1.0
    return {"inputs": inputs, "targets": targets, "weights": weights}

  names = [f"k{token}" if token < half else f"v{token}" for token in range(vocab_size)]
  return generated_task(
    "recall",
    draw=draw,
    vocabulary=Vocabulary((".", *names[1:])),
    seed=seed,
    description="Pairs of key and value, then each key once; asked for its value (MQAR).",
    settings={
      "seq_len": seq_len,
      "pairs": pairs,
      "vocab_size": vocab_size,
      "power_a": power_a,
      "random_non_queries": random_non_queries,
    },
    baselines={"chance": math.log2(vocab_size - half)},
  )


def _gap_probabilities(space: int, power_a: float) -> Float[np.ndarray, " space"]:
  weights = np.arange(1, space + 1, dtype=np.float64) ** (power_a - 1.0)
  return weights / weights.sum()
