"""Copy: say again what came before the bar.

    tokens   c a f b e | c a f b e . . .
    scored               ^ ^ ^ ^ ^

The symbols are uniform and independent, and so is their number, from half of what fits to all of
it, so that the answer lies at no fixed distance. The answer is fed in as it is scored, one token
late, as text is. A perfect model scores 0 nats; one that only counts the symbols log(symbols).

Source: Graves, Wayne, Danihelka, "Neural Turing Machines" (2014), section 4.1; as a test of
recurrent states against attention: Jelassi et al., "Repeat After Me" (2024), https://arxiv.org/abs/2402.01032.
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


def make(*, seq_len: int, seed: int, symbols: int = 26) -> Task:
  """The copy task at `seq_len` tokens.

  Args:
    seq_len: T; at most T // 2 symbols are copied.
    seed: Selects the records.
    symbols: Size of the alphabet.

  Raises:
    ValueError: `seq_len` leaves no room for one symbol and its copy.
  """
  check_count(seq_len, 2, what="seq_len for the task copy")
  check_count(symbols, 2, what="copy:symbols")
  bar, blank = symbols, symbols + 1
  longest = seq_len // 2
  shortest = (longest + 1) // 2

  def draw(random: np.random.Generator) -> Record:
    count = int(random.integers(shortest, longest + 1))
    text = random.integers(symbols, size=count)
    tokens = np.full(seq_len + 1, blank)
    tokens[:count] = text
    tokens[count] = bar
    tokens[count + 1 : 2 * count + 1] = text
    return as_record(tokens, slice(count + 1, 2 * count + 1))

  return generated_task(
    "copy",
    draw=draw,
    vocabulary=Vocabulary((*letters(symbols), "|", ".")),
    seed=seed,
    description="Random symbols, a bar, and the same symbols again.",
    settings={"seq_len": seq_len, "symbols": symbols},
    baselines={"chance": math.log2(symbols)},
  )
