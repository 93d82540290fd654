"""XLA's own estimate of a TPU program: cycles that it wrote beside the operations.

The text of a compiled module has `"estimated_cycles":"2121"` behind what XLA's cost model knows, in
whatever computation it stands. A `while` runs its body as often as its condition, a comparison of
a counter from 0 with a constant, says. The model counts memory as well as arithmetic, and some 2000
cycles for starting an operation: it is no count of bundles, and what a kernel's bundles take may
not be set against it digit by digit.
"""

import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.\-]+) \(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_WHILE = re.compile(r" while\(.*\bcondition=(%[\w.\-]+), body=(%[\w.\-]+)")
_LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


def computations(text: str) -> dict[str, list[str]]:
  """Name -> lines; the entry is also under ""."""
  found: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = found[match[1]] = []
      if line.startswith("ENTRY"):
        found[""] = lines
    lines.append(line)
  return found


def cycles(text: str) -> float | None:
  """Of a whole module, or None where it does not tell how often a loop turns."""
  every = computations(text)
  try:
    return _cycles(every, "")
  except LookupError:
    return None


def _cycles(every: dict[str, list[str]], name: str) -> float:
  total = 0.0
  for line in every[name]:
    if match := _WHILE.search(line):
      condition, body = match.groups()
      (turns,) = {int(n) for n in _LIMIT.findall("\n".join(every[condition]))} or {0}
      if not turns:
        raise LookupError(condition)
      total += turns * _cycles(every, body)
    elif match := _CYCLES.search(line):
      total += int(match[1])
  return total
