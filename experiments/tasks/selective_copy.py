"""Selective copy: say again the symbols that were strewn among noise, in their order.

    tokens   . . b . . . e . a . . | b e a
    scored                           ^ ^ ^

The number of symbols is fixed, their places are uniform. What to keep depends on the content, so
that a convolution (or any map that does not vary with the input) cannot solve it. A perfect model
scores 0 nats; chance is log(symbols).

Source: Gu and Dao, "Mamba" (2023), section 4.1.1, https://arxiv.org/abs/2312.00752: 16 symbols of
an alphabet of 16. Here the answer is fed in as it is scored, one token late, as text is.
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


def make(*, seq_len: int, seed: int, symbols: int = 16, count: int | None = None) -> Task:
  """The selective copy task at `seq_len` tokens.

  Args:
    seq_len: T; the first T - count tokens hold symbols and noise.
    seed: Selects the records.
    symbols: Size of the alphabet.
    count: Symbols to remember; None means 16, or a quarter of `seq_len` where that is less.

  Raises:
    ValueError: `seq_len` is shorter than twice `count`.
  """
  check_count(seq_len, 4, what="seq_len for the task selective_copy")
  check_count(symbols, 2, what="selective_copy:symbols")
  count = min(16, seq_len // 4) if count is None else count
  check_count(count, 1, what="selective_copy:count")
  check_count(seq_len, 2 * count, what=f"seq_len for the task selective_copy with count={count}")
  noise, bar = symbols, symbols + 1
  context = seq_len - count

  def draw(random: np.random.Generator) -> Record:
    places = np.sort(random.choice(context, size=count, replace=False))
    text = random.integers(symbols, size=count)
    tokens = np.full(seq_len + 1, noise)
    tokens[places] = text
    tokens[context] = bar
    tokens[context + 1 :] = text
    return as_record(tokens, slice(context + 1, None))

  return generated_task(
    "selective_copy",
    draw=draw,
    vocabulary=Vocabulary((*letters(symbols), ".", "|")),
    seed=seed,
    description="Symbols at random places among noise, a bar, and the symbols again.",
    settings={"seq_len": seq_len, "symbols": symbols, "count": count},
    baselines={"chance": math.log2(symbols)},
  )
