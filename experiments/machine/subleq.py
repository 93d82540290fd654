"""A machine with one instruction, in plain Python: its interpreter, and an assembler for it.

    subleq a b c        memory[b] -= memory[a];  if memory[b] <= 0 go to c, else to what follows

Programs and data share one memory of integers (Mavaddat and Parhami 1988); an instruction is three
cells of it. An operand is a cell like any other, so a program that walks along a list subtracts
from its own operands. It halts by an instruction that jumps to itself.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

CELLS = 4095
"""Of the memory at the most: so far the squares of addresses are exact in float32."""
LARGEST = 4094
"""No word is more, nor its negative: so far the products of two are exact in float32."""


class Step(NamedTuple):
  """What one instruction did: it wrote `value` to `address`, and the one at `next` is next."""

  next: int
  address: int
  value: int


class MachineError(Exception):
  """The program asks for what the machine has not."""


def interpret(image: Sequence[int]) -> Iterator[Step]:
  """The steps of a program, from the instruction at 0 to the one that halts."""
  memory, pc = list(image), 0
  while True:
    if not 0 <= pc <= len(memory) - 3:
      raise MachineError(f"there is no instruction at {pc}")
    a, b, c = memory[pc : pc + 3]
    if not (0 <= a < len(memory) and 0 <= b < len(memory)):
      raise MachineError(f"the instruction at {pc} asks for cells {a} and {b} of {len(memory)}")
    value = memory[b] - memory[a]
    if abs(value) > LARGEST:
      raise MachineError(f"the instruction at {pc} makes {value}, beyond {LARGEST}")
    memory[b] = value
    here, pc = pc, c if value <= 0 else pc + 3
    yield Step(pc, b, value)
    if pc == here:
      return


@dataclasses.dataclass(frozen=True)
class Program:
  """What lies in memory at the start, and names for its cells."""

  image: tuple[int, ...]
  labels: Mapping[str, int]
  """Name -> cell, ascending."""

  def name(self, address: int) -> str:
    """The last label before a cell, and how far it is."""
    before = [(at, label) for label, at in self.labels.items() if at <= address]
    if not before:
      return str(address)
    start, label = before[-1]
    return label if start == address else f"{label}+{address - start}"


_LINE = re.compile(r"(?:(\w+):)?\s*(.*)")
_WORD = re.compile(r"([a-z]\w*)([+-]\d+)?")


def assemble(text: str, data: Mapping[str, Sequence[int]]) -> Program:
  """A program from lines `label: a b c`: operands are labels, `+1` or `-1` cells beside them; no c
  goes on to what follows either way; `#` begins a comment. The data lie behind, in order.

  Raises: MachineError: a label that is missing or stands twice, or more than fits.
  """
  words: list[int | str] = []
  labels: dict[str, int] = {}

  def place(label: str) -> None:
    if label in labels:
      raise MachineError(f"the label {label!r} stands twice")
    labels[label] = len(words)

  for line in text.splitlines():
    match = _LINE.fullmatch(line.split("#")[0].strip())
    label, operands = match.groups() if match else (None, line)
    if label:
      place(label)
    found = operands.split()
    if len(found) not in (0, 2, 3):
      raise MachineError(f"an instruction has two or three operands, not {line.strip()!r}")
    words += [*found, len(words) + 3][:3] if found else []
  for label, values in data.items():
    place(label)
    words += values
  image = tuple(word if isinstance(word, int) else _resolved(word, labels) for word in words)
  if len(image) > CELLS:
    raise MachineError(f"the program takes {len(image)} cells, and there are {CELLS}")
  if large := [word for word in image if abs(word) > LARGEST]:
    raise MachineError(f"the program has the word {large[0]}, beyond {LARGEST}")
  return Program(image, labels)


def _resolved(word: str, labels: Mapping[str, int]) -> int:
  match = _WORD.fullmatch(word)
  if not match or match[1] not in labels:
    raise MachineError(f"there is no label {word!r}")
  return labels[match[1]] + int(match[2] or 0)
