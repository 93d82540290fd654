"""float32 for tensor cores that multiply bfloat16: a number is the sum of three, of 8 bits each.

    x = x_0 + x_1 + x_2        a b = sum over i + j <= 2 of a_i b_j        six products

What the three products that are left out would add is 2^-24 of a b and less; XLA calls this
`BF16_BF16_F32_X6`. An operand of a product is a tuple of its parts, each with a place of its own in
memory: three of float32, one of bfloat16, with which everything here is what `hopper` does.
(Tensor cores also take TF32, of 11 bits, which would need two parts of twice the bytes, and read no
matrix transposed.)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper

Array = jax.Array
Parts = Sequence[Any]
"""Of an operand: arrays, refs or tiles in registers."""


def count(dtype: Any) -> int:
  """How many bfloat16 a number is."""
  return 3 if dtype == jnp.float32 else 1


def dtype(parts: Parts) -> Any:
  """Of the numbers that these are the parts of."""
  return jnp.float32 if len(parts) > 1 else parts[0].dtype


def cut(x: Array) -> tuple[Array, ...]:
  """An array as its parts, outside of a kernel."""
  if x.dtype != jnp.float32:
    return (x,)
  parts = []
  for _ in range(count(x.dtype)):
    # Not by a conversion and back, which XLA takes out as excess precision.
    part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(jnp.bfloat16))
    x = x - part
  return tuple(parts)


def whole(parts: Parts) -> Array:
  """The float32 that the parts add up to, the smallest first: exact."""
  total = parts[-1].astype(jnp.float32)
  for part in reversed(parts[:-1]):
    total = total + part.astype(jnp.float32)
  return total


def split(x: Array, many: int) -> tuple[Array, ...]:
  """A tile of float32 in registers as its parts."""
  parts = []
  for i in range(many):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32) if i + 1 < many else x
  return tuple(parts)


def load(smem: Parts) -> Array:
  """The float32 that tiles in shared memory add up to."""
  return whole([plgpu.load(x, layout=hopper.TILE) for x in smem])


def store(x: Array, smem: Parts) -> None:
  """A tile of float32 to the places of its parts; who multiplies them commits first."""
  for part, place in zip(split(x, len(smem)), smem, strict=True):
    place[...] = part


def at(refs: Parts, *index: Any) -> tuple[Any, ...]:
  """The same place in every part."""
  return tuple(ref.at[index] for ref in refs)


class Fresh(Sequence):
  """An operand of several parts whose places are made anew at every use. Products that share a part
  would share its descriptors, and 24 of them are 48 registers that nothing else has until the last.
  """

  def __init__(self, buffers: Parts, slot: Array | int, step: Array | int):
    """The entry of this slot in buffers; operands share nothing whose steps differ by some uses."""
    self._buffers, self._slot, self._step, self._uses = buffers, slot, step, 0

  def __len__(self) -> int:
    return len(self._buffers)

  def __getitem__(self, i: Any) -> Any:
    if isinstance(i, slice):
      return tuple(self)[i]
    self._uses += len(self) > 1
    return self._buffers[i].at[hopper.unhoisted(self._slot, self._step + self._uses)]


def _pairs(a: Parts, b: Parts) -> list[tuple[Any, Any]]:
  """What is multiplied, the smallest first."""
  last = len(a) - 1
  return [(a[i], b[n - i]) for n in range(last, -1, -1) for i in range(n + 1)]


def multiply(
  a_smem: Parts, b_smem: Parts, start: Array | None = None, *, a_t=False, b_t=False, on_chip: bool
) -> Any:
  """a b of two operands in shared memory, either of them transposed, added to `start`."""
  pairs = _pairs(a_smem, b_smem)
  if not on_chip:
    for a, b in pairs:
      start = hopper.multiply(a, b, start, a_t=a_t, b_t=b_t, on_chip=False)
    return start

  def run(acc_ref):
    for a, b in pairs:
      plgpu.wgmma(acc_ref, a.T if a_t else a, b.T if b_t else b)
    return acc_ref[...] if start is None else None

  if start is None:
    shape = a_smem[0].shape[1 if a_t else 0], b_smem[0].shape[0 if b_t else 1]
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
  return pl.run_state(run)(plgpu.ACC.init(start))


def product(a_smem: Parts, b_smem: Parts, start: Array | None = None, *, on_chip: bool) -> Any:
  """a b^T of two operands in shared memory, added to `start`."""
  return multiply(a_smem, b_smem, start, b_t=True, on_chip=on_chip)


def add(total: Array, p: Array, v_smem: Parts, *, on_chip: bool) -> Any:
  """total + p v: p a tile of float32 in registers, v in shared memory."""
  pairs = _pairs(split(p, len(v_smem)), v_smem)
  if not on_chip:
    for p, v in pairs:
      (total,) = hopper.add_products((total, p, v), on_chip=False)
    return total

  def run(ref):
    for p, v in pairs:
      plgpu.wgmma(ref, p, v)

  return pl.run_state(run)(plgpu.ACC.init(total))
