"""Calls as data, and the work in them: of softmax attention (bfloat16, B=1, T=S, causal), of linear
attention at the shapes of fla's registry, of hard-max attention (float32).
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Final

import jax.numpy as jnp
import numpy as np

from attention import masks
from attention.masks import Mask, Span
from experiments.benchmarks.cases import FLA, LinearCase
from pallas_kernels import aot
from pallas_kernels.bundles import Trips

FORWARD, BACKWARD = "forward", "backward"
STEP = "step"
"""One token more, of linear attention."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
  """One call, in the letters of `attention/types.py`."""

  what: str
  T: int
  N: int
  K: int
  H: int
  h: int
  window: int | None = None
  documents: int = 1
  """How many documents of equal length are packed into the row."""
  mechanism: ClassVar[str] = "flash"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanarShape(Shape):
  """A call of hard-max attention, whose scores no matrix unit multiplies."""

  mechanism: ClassVar[str] = "hardmax"


_SOFTMAX: Final[Mapping[str, Shape]] = {
  "7b_4k": Shape(what="a 7B model", T=4096, N=32, K=8, H=128, h=128),
  "7b_32k": Shape(what="a 7B model, long", T=32768, N=32, K=8, H=128, h=128),
  "h64_4k": Shape(what="narrow heads", T=4096, N=32, K=8, H=64, h=64),
  "h256_4k": Shape(what="wide heads", T=4096, N=16, K=16, H=256, h=256),
  "mla_4k": Shape(what="multi-head latent attention", T=4096, N=16, K=16, H=192, h=128),
  "window_32k": Shape(
    what="a 7B model, window 4096", T=32768, N=32, K=8, H=128, h=128, window=4096
  ),
  "packed_8k": Shape(
    what="a 7B model, four documents", T=8192, N=32, K=8, H=128, h=128, documents=4
  ),
}

_LINEAR: Final[Mapping[str, LinearCase]] = {
  f"{case.B}x{case.T >> 10}k_{case.N}x{case.H}_{case.decay}": case
  for case in sorted(FLA, key=lambda case: case.decay, reverse=True)
}

_HARD: Final[Mapping[str, Shape]] = {
  "planar_16k": PlanarShape(what="heads of width 2", T=16384, N=8, K=8, H=2, h=64),
  "nearest_1k": PlanarShape(what="lifted keys, grouped heads", T=1000, N=8, K=2, H=5, h=64),
}

SHAPES: Final[Mapping[str, Shape | LinearCase]] = {**_SOFTMAX, **_LINEAR, **_HARD}


def mask(shape: Shape) -> Mask:
  """The shape's mask; the document of each position is an array."""
  whole = masks.causal()
  if shape.window is not None:
    whole = whole & masks.sliding_window(shape.window - 1)
  if shape.documents > 1:
    ids = np.arange(shape.T, dtype=np.int32) // (shape.T // shape.documents)
    whole = whole & masks.segments(jnp.asarray(ids)[None])
  return whole


def pairs(shape: Shape) -> int:
  """Allowed (query, key) pairs of one head."""
  length = shape.T // shape.documents
  reach = np.minimum(np.arange(1, length + 1), shape.window or length)
  return shape.documents * int(reach.sum())


def flops(shape: Shape, kind: str) -> int:
  """What has to be multiplied: two products forward, five backward, over the allowed pairs."""
  H, h = shape.H, shape.h
  widths = H + h if kind == FORWARD else 3 * H + 2 * h
  return 2 * shape.N * pairs(shape) * widths


def least(shape: Shape | LinearCase, kind: str, chip: aot.Chip) -> float:
  """Seconds that a chip cannot do without: its matrix units', or its memory's."""
  if isinstance(shape, LinearCase):
    return shape.moved(kind) / chip.bandwidth
  return flops(shape, kind) / chip.peak


def visits(shape: Shape, block_q: int, block_k: int) -> tuple[np.ndarray, np.ndarray]:
  """For one head, bool `q_blocks k_blocks`: which blocks are visited, which need no mask."""
  answer = mask(shape).block(Span.blocks(shape.T, block_q), Span.blocks(shape.T, block_k))
  size = (-(-shape.T // block_q), -(-shape.T // block_k))
  some, every = (
    np.broadcast_to(np.asarray(x).reshape(np.shape(x)[-2:]), size) for x in (answer.any, answer.all)
  )
  return some, every


def trips(
  shape: Shape, block_q: int, block_k: int, *, by_key: bool = False, all_steps: bool = True
) -> Trips:
  """How often the parts of a kernel run, over all heads.

  Args:
    shape: the call.
    block_q: rows of a block.
    block_k: columns of a block.
    by_key: whether its outer axis is the keys'.
    all_steps: whether its grid has a step for each block, visited or not.
  """
  some, every = visits(shape, block_q, block_k)
  rows, heads = some.shape[int(by_key)], shape.N
  steps = some.size if all_steps else int(some.sum())
  full = int((some & every).sum())
  return Trips(heads * full, heads * (int(some.sum()) - full), heads * rows, heads * steps)
