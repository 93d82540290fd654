"""Reads a TPU kernel's final schedule: which bundles are in which loop, and what keeps them busy.

A TPU core starts one bundle of instructions a cycle, when nothing stalls. libtpu's dump of the last
stage, `*-final_bundles.txt`, is one record per bundle (comments may run over several lines):

      0x10 LB: > { %s1 = sst [smem:[#allocation16_spill]] %s14 } /* Start region 113 */
      0x53   : > { %381 = sbr.rel (%p7609_p5) target = $region48 }
     0x119 PF: > { %s2 = sld [smem:[#allocation20_spill]] } /* Start/End empty region 48 */

`sbr.rel` is the only jump. One that goes back closes a loop; one that goes forward skips what lies
between (a `pl.when`, or one side of a `cond`). A branch takes effect some delay slots later. The
target's number appears in the comment of the bundle at which that region starts. So loops and
skipped regions nest, and make a tree.

`*-final_hlo-static-per-bundle-utilization.txt` has a header of unit names and one line of counts
per bundle of the same program, in the same order:

    == CAPACTIY:
    MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
        4     3     4     2     1     3     3     1     1     2
    == UTILIZATION:
    2 0 1 0 0 1 0 0 0 1
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

# Parts of a program with less than this share of its matrix instructions are not where time goes.
HOT = 0.02

_RECORD = re.compile(r"^ *(0x[0-9a-f]+|0) +((?:[A-Z]{2})?) *: [ >]*(.*)")
_BRANCH = re.compile(r"\bsbr\.rel (?:\([^)]*\) )?target = \$region(\d+)")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")


class Node(NamedTuple):
  """A stretch of bundles [start, end): the program, a loop, or a region that a branch may skip."""

  kind: str
  """"program", "loop" or "region"."""
  start: int
  end: int
  children: tuple["Node", ...] = ()

  @property
  def bundles(self) -> int:
    """How many, everything inside included."""
    return self.end - self.start

  @property
  def own(self) -> int:
    """Those that are in no child."""
    return self.bundles - sum(child.bundles for child in self.children)

  def walk(self) -> Iterator["Node"]:
    """This node and all below, parents first."""
    yield self
    for child in self.children:
      yield from child.walk()


class Schedule(NamedTuple):
  """A kernel's program and what its bundles use."""

  root: Node
  units: tuple[str, ...]
  capacity: np.ndarray
  """int `units`: how many instructions of a unit one bundle can hold."""
  used: np.ndarray
  """int `bundles units`."""

  def instructions(self, node: Node, unit: str) -> int:
    """Instructions of a unit within a node, everything inside included."""
    return int(self.used[node.start : node.end, self.units.index(unit)].sum())

  def busy(self, node: Node, unit: str) -> float:
    """The share of a node's bundles that hold any instruction of a unit."""
    column = self.used[node.start : node.end, self.units.index(unit)]
    return float((column > 0).mean())

  def filled(self, node: Node, unit: str) -> float:
    """The share of a unit's slots, over a node's bundles, that hold an instruction."""
    slots = node.bundles * int(self.capacity[self.units.index(unit)])
    return self.instructions(node, unit) / slots


def records(text: str) -> list[str]:
  """The bundles of a `final_bundles` dump, in order, each with its comments."""
  found: list[str] = []
  for line in text.splitlines():
    if match := _RECORD.match(line):
      if int(match[1], 0) != len(found):
        raise ValueError(f"bundle {match[1]} follows bundle {len(found) - 1:#x}")
      found.append(match[3])
    elif found:
      found[-1] += "\n" + line
  if not found:
    raise ValueError("the dump holds no bundle")
  return found


def tree(text: str, delay_slots: int) -> Node:
  """The loops and skipped regions of a `final_bundles` dump."""
  bundles, starts, spans = records(text), {}, []
  for address, bundle in enumerate(bundles):
    starts |= {int(number): address for number in _START.findall(bundle)}
  for address, bundle in enumerate(bundles):
    for number in _BRANCH.findall(bundle):
      after, target = address + 1 + delay_slots, starts.get(int(number), len(bundles))
      if target <= address:
        spans.append((target, min(after, len(bundles)), "loop"))
      elif target > after:
        spans.append((after, target, "region"))
  # A longer span first, so that a parent is met before its children; a loop before a region.
  spans.sort(key=lambda span: (span[0], -span[1], span[2]))
  return Node("program", 0, len(bundles), _nest(spans, 0, len(bundles)))


def _nest(spans: list[tuple[int, int, str]], start: int, end: int) -> tuple[Node, ...]:
  """The spans within [start, end) as a forest; one that crosses a border is cut there."""
  nodes = []
  while spans and spans[0][0] < end:
    first, last, kind = spans.pop(0)
    first, last = max(first, start), min(last, end)
    if first < last:
      nodes.append(Node(kind, first, last, _nest(spans, first, last)))
      start = last
  return tuple(nodes)


def parse(bundles: str, utilization: str, delay_slots: int) -> Schedule:
  """A schedule from the two dumps.

  Raises:
    ValueError: they are not what this parser knows, or do not belong together.
  """
  root = tree(bundles, delay_slots)
  lines = [line for line in utilization.splitlines() if line.strip()]
  if len(lines) < 5 or not lines[1].startswith("MXU") or not lines[3].startswith("=="):
    raise ValueError(f"not a dump of utilization: it begins {lines[:2]}")
  units = tuple(name.strip() for name in lines[1].split(","))
  capacity = np.array(lines[2].split(), np.int64)
  used = np.array([line.split() for line in lines[4:]], np.int64)
  if used.shape != (root.end, len(units)):
    raise ValueError(f"{root.end} bundles of {len(units)} units, but utilization {used.shape}")
  return Schedule(root, units, capacity, used)


def hot(schedule: Schedule) -> list[Node]:
  """The innermost loops and regions that hold the matrix instructions; if none does, the loop that
  all is in, or the program.
  """
  least = HOT * schedule.instructions(schedule.root, "MXU")

  def find(node: Node) -> list[Node]:
    below = [found for child in node.children for found in find(child)]
    if below:
      return below
    count = schedule.instructions(node, "MXU")
    return [node] if count and count >= least else []

  loops = [child for child in schedule.root.children if child.kind == "loop"]
  return find(schedule.root) or (loops if len(loops) == 1 else [schedule.root])


def hot_loop(schedule: Schedule) -> Node:
  """The innermost loop around the hot nodes: the body that one step runs."""
  nodes = hot(schedule)
  around = [
    node
    for node in schedule.root.walk()
    if all(node.start <= inner.start and inner.end <= node.end for inner in nodes)
  ]
  loops = [node for node in around if node.kind == "loop"]
  return (loops or around)[-1]


class Trips(NamedTuple):
  """How often the parts of a kernel run, over its whole grid, on one core."""

  full: float
  """Visited blocks that need no mask."""
  mixed: float
  """Visited blocks that do."""
  rows: float
  """Blocks of the outer axis: how often a running sum is started and stored."""
  steps: float
  """Steps of the grid, those that visit nothing included."""
  starts_inside: bool = False
  """Whether what starts a row lies within what every step runs."""


def cycles(schedule: Schedule, trips: Trips) -> float | None:
  """Bundles that the whole kernel starts, or None if its shape is not one that we understand.

  Known shapes: one hot node that every visit runs, or two, of which the shorter runs for full and
  the longer for mixed blocks. What is around hot regions runs once a step, what is around hot loops
  once a row. A part without matrix instructions runs once a row, or with the hot node it is in;
  with `trips.starts_inside` also there once a row, as where a step that works starts a row first.
  """
  nodes = hot(schedule)
  if len(nodes) > 2:
    return None
  visits = {nodes[0]: trips.full + trips.mixed}
  if len(nodes) == 2:
    short, long = sorted(nodes, key=lambda node: node.bundles)
    visits = {short: trips.full, long: trips.mixed}
  return _cycles(schedule.root, 1.0, visits, trips)


def _cycles(node: Node, times: float, visits: Mapping[Node, float], trips: Trips) -> float:
  total = node.own * times
  for child in node.children:
    inner = [n for n in visits if child.start <= n.start and n.end <= child.end]
    if child in visits:
      runs = visits[child]
    elif not inner:
      runs = times if node in visits and not trips.starts_inside else min(times, trips.rows)
    elif any(n.kind == "loop" for n in inner):
      runs = trips.rows
    else:
      runs = trips.steps
    total += _cycles(child, runs, visits, trips)
  return total
