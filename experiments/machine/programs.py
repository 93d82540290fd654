"""Programs for the machine, each with a question and the answer that Python gives."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from experiments.machine.subleq import MachineError, Program, assemble


@dataclasses.dataclass(frozen=True)
class Task:
  """A program, and what it should leave behind."""

  program: Program
  question: str
  answer: str
  read: Callable[[Sequence[int]], str]
  """The answer that lies in a memory."""


@dataclasses.dataclass(frozen=True)
class Maker:
  """How to make a task of any size."""

  make: Callable[[int, int], Task]
  """From size and seed."""
  size: int
  unit: str


_CONSTANTS = {"zero": [0], "one": [1], "minus": [-1]}

SORT = """
next:   one    left    halt     # insert list[i], which lies at take
        key    key
take:   list+1 key              # key = -list[i]
        take   zero
        look   look
        zero   look
        one    look             # look at list[i - 1]
        low+1  low+1
        zero   low+1
        one    low+1            # low is there too
        high+1 high+1
        zero   high+1           # and high at list[i]
        zero   zero
        minus  take
loop:   gap    gap
        key    gap
look:   list   gap     high     # gap = list[i] - what lies below
        zero   zero    next
high:   gap    list+1           # not more: they change places
        gap    zero
low:    zero   list
        one    look
        one    low+1
        one    high+1
        zero   zero    loop
halt:   zero   zero    halt
"""

ADD = """
loop:
from:   second zero             # first += second + carry, digit by digit
to:     zero   first
        zero   zero
plus:   carry  first            # carry is 0 or -1
        carry  carry
        rest   rest
        tens   rest             # rest = 10
look:   first  rest    over
        zero   zero    step
over:   one    carry
less:   ten    first
step:   minus  from
        minus  to+1
        minus  plus+1
        minus  look
        minus  less+1
        one    left    halt
        zero   zero    loop
halt:   zero   zero    halt
"""

PARITY = """
even:   one    left    halt     # a state is a place in the program
        minus  here
        minus  there
        mark   mark
        minus  mark
here:   tape-1 mark    odd      # mark = 1 - tape[i]
        zero   zero    even
odd:    one    left    end
        minus  here
        minus  there
        mark   mark
        minus  mark
there:  tape-1 mark    even
        zero   zero    odd
end:    minus  answer
halt:   zero   zero    halt
"""


def sort(size: int, seed: int) -> Task:
  """Insertion sort, in place."""
  numbers = _random(seed, size, 1000)
  data = _CONSTANTS | {"left": [size], "key": [0], "gap": [0], "floor": [-1], "list": numbers}
  return _task(SORT, data, "list", size, f"sort {_short(numbers)}", sorted(numbers))


def add(size: int, seed: int) -> Task:
  """Two decimal numbers of `size` digits, the lowest digit first; the sum replaces the first."""
  first, second = _random(seed, size, 10), _random(seed + 1, size, 10)
  total = _number(first) + _number(second)
  data = _CONSTANTS | {"ten": [10], "tens": [-10], "left": [size + 1], "carry": [0], "rest": [0]}
  data |= {"first": [*first, 0], "second": [*second, 0]}
  digits = [total // 10**i % 10 for i in range(size + 1)]
  question = f"add {_short(first[::-1], '')} and {_short(second[::-1], '')}"
  return _task(ADD, data, "first", size + 1, question, digits, backwards=True)


def parity(size: int, seed: int) -> Task:
  """Whether the number of ones on a tape is odd, by an automaton of two states."""
  tape = _random(seed, size, 2)
  data = _CONSTANTS | {"left": [size + 1], "mark": [0], "answer": [0], "tape": tape}
  return _task(PARITY, data, "answer", 1, f"parity of {_short(tape, '')}", [sum(tape) % 2])


PROGRAMS: Final[Mapping[str, Maker]] = {
  "sort": Maker(sort, 645, "numbers"),
  "add": Maker(add, 1500, "digits"),
  "parity": Maker(parity, 4000, "bits"),
}
"""Name -> program, with a size that nearly fills the memory, or runs for a million steps."""


def make(name: str, size: int, seed: int = 0) -> Task:
  """A task of `PROGRAMS`; size 0 is its own."""
  one = PROGRAMS[name]
  try:
    return one.make(size or one.size, seed)
  except MachineError as error:
    raise ValueError(f"--size={size} {one.unit} are too many: {error}") from error


def _task(
  text: str,
  data: Mapping[str, Sequence[int]],
  label: str,
  count: int,
  question: str,
  answer: Sequence[int],
  *,
  backwards: bool = False,
) -> Task:
  program = assemble(text, data)
  start, between = program.labels[label], "" if backwards else " "
  show = lambda cells: between.join(map(str, cells[::-1] if backwards else cells))
  read = lambda memory: show(memory[start : start + count])
  return Task(program, question, show(answer), read)


def _random(seed: int, count: int, below: int) -> list[int]:
  generator = random.Random(seed)
  return [generator.randrange(below) for _ in range(count)]


def _number(digits: Sequence[int]) -> int:
  """Of decimal digits, the lowest first."""
  return sum(digit * 10**i for i, digit in enumerate(digits))


def _short(values: Sequence[int], between: str = " ") -> str:
  """The first few, and how many."""
  text = between.join(map(str, values[:12]))
  return text if len(values) <= 12 else f"{text}{between}... ({len(values)})"
