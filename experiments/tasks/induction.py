"""Induction: after the mark comes what came after the mark the last time.

    tokens   d a * c b b e a d *  c
    scored                        ^

Random symbols with one mark (*) among them at a uniform place, and a second one as the last input;
one token is scored in each record. A perfect model scores 0 nats; chance is log(symbols).

Source: Fu et al., "Hungry Hungry Hippos" (2023), section 3.1, https://arxiv.org/abs/2212.14052, and
Gu and Dao, "Mamba" (2023), section 4.1.2, https://arxiv.org/abs/2312.00752 (length 256, 16 tokens);
the mechanism: Olsson et al., "In-context Learning and Induction Heads" (2022),
https://arxiv.org/abs/2209.11895.
"""

import math

import numpy as np

from experiments.data.source import Record
from experiments.tasks.task import (
  Task,
  Vocabulary,
  as_record,
  check_count,
  generated_task,
  letters,
)


def make(*, seq_len: int, seed: int, symbols: int = 16) -> Task:
  """The induction task at `seq_len` tokens.

  Args:
    seq_len: T, the second mark included.
    seed: Selects the records.
    symbols: Size of the alphabet, without the mark.

  Raises:
    ValueError: `seq_len` leaves no room for mark, symbol, mark.
  """
  check_count(seq_len, 3, what="seq_len for the task induction")
  check_count(symbols, 2, what="induction:symbols")
  mark = symbols

  def draw(random: np.random.Generator) -> Record:
    tokens = random.integers(symbols, size=seq_len + 1)
    place = int(random.integers(seq_len - 2))
    tokens[place] = mark
    tokens[seq_len - 1] = mark
    tokens[seq_len] = tokens[place + 1]
    return as_record(tokens, slice(seq_len, None))

  return generated_task(
    "induction",
    draw=draw,
    vocabulary=Vocabulary((*letters(symbols), "*")),
    seed=seed,
    description="Random symbols with a mark; after the second mark, what followed the first.",
    settings={"seq_len": seq_len, "symbols": symbols},
    baselines={"chance": math.log2(symbols)},
  )
