"""Batches of one process, as a pure function of (seed, step)."""

import sys
from collections.abc import Iterator

import grain
import numpy as np

from experiments.data.source import EpochSource, Record, Source

_IN_LINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
"""Records come from memory: threads would only cost (measured five times slower)."""


def batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  repeat: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
  """Iterates over this process's rows of each global batch, from `start_step` on.

  Global batch s holds records [s B, s B + B) of a shuffled order that depends on (seed, epoch)
  only. Process p of n gets its rows [p B/n, (p + 1) B/n). Nothing else is remembered, so a run
  goes on at any step, on any number of processes, with the batches it would have seen.

  Args:
    source: Where records come from.
    batch_size: B, rows of the global batch.
    seed: Any non-negative integer; another seed is another order.
    start_step: The first global batch to give.
    process_index, process_count: p and n.
    repeat: True goes on for ever, each epoch in an order of its own. False reads the source once,
      in the order of the first epoch, and fills the last batch up with records of weight 0: for
      exact evaluation, and, cut short, for evaluation on a fair sample.

  Returns:
    An iterator of {"inputs": int32 [b, T], "targets": int32 [b, T], "weights": float32 [b, T]}
    with b = B / n.

  Raises:
    ValueError: Sizes that do not fit each other, printed both.
  """
  size = len(source)
  _check(size, batch_size, seed, start_step, process_index, process_count, repeat)
  rows = batch_size // process_count
  order = grain.MapDataset.range(size).seed(_fold(seed)).shuffle()
  order = order.repeat() if repeat else order
  steps = sys.maxsize // batch_size if repeat else -(-size // batch_size)

  def assemble(step: int) -> dict[str, np.ndarray]:
    first = step * batch_size + process_index * rows
    return _stack([_record(source, order, first + row, size, repeat) for row in range(rows)])

  dataset = grain.MapDataset.range(steps).map(assemble)
  iterator = iter(dataset.to_iter_dataset(_IN_LINE))
  grain.experimental.set_next_index(iterator, min(start_step, steps))
  return iterator


def _record(
  source: Source, order: grain.MapDataset[int], position: int, size: int, repeat: bool
) -> Record:
  """The record at a place of the shuffled order; past the end of a single reading, an empty one."""
  if position >= size and not repeat:
    return {key: np.zeros_like(value) for key, value in source[0].items()}
  index = order[position]
  assert index is not None  # for the type checker: only a filter leaves holes in a MapDataset
  epoch = position // size
  if epoch and isinstance(source, EpochSource):
    return source.epoch(epoch)[index]
  return source[index]


def _stack(records: list[Record]) -> dict[str, np.ndarray]:
  return {key: np.stack([record[key] for record in records]) for key in records[0]}


def _fold(seed: int) -> int:
  """A seed of any size as the 32 bits that the shuffle takes."""
  return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _check(
  size: int,
  batch_size: int,
  seed: int,
  start_step: int,
  process_index: int,
  process_count: int,
  repeat: bool,
) -> None:
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  if process_count < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size must be a multiple of the number of processes, got batch_size={batch_size} and "
      f"{process_count} processes"
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index must lie in [0, {process_count}), got {process_index}")
  if seed < 0 or start_step < 0:
    raise ValueError(f"seed and start_step must not be negative, got {seed} and {start_step}")
  if repeat and size < batch_size:
    raise ValueError(
      f"the data has {size} records, fewer than one batch of batch_size={batch_size}; give more "
      "data, a smaller batch_size or a shorter seq_len"
    )
