"""The rows of a batch and their heads, worked through part by part, so that a part fits a cache.

An axis of n units is seen as `side` equal runs, and a part has one unit of each: part i those at i
of every run. A mesh cuts an axis into equal runs too. So where `side` is a multiple of its devices
every device has its own share of every part, and no loop walks from one device to the next; a loop
over single units would make XLA gather the axis on all of them.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Part(NamedTuple):
  """Some of the units of an axis: those at `index` of each of `side` equal runs."""

  units: int
  side: int
  index: Array | int


def devices() -> int | None:
  """How many devices the mesh in context has, those of `jax.shard_map` aside; None without one,
  for then a program may yet be given arrays that are cut.
  """
  mesh = jax.sharding.get_abstract_mesh()
  manual = math.prod(mesh.shape[axis] for axis in mesh.manual_axes)
  return None if mesh.empty else mesh.size // manual


def side(units: int, least: int, most: int) -> int:
  """How many of `units` go side by side: the largest divisor up to `most`, but one that a mesh of
  `least` devices, as far as they divide the units, can cut.
  """
  whole = math.gcd(units, least)
  fitting = (n for n in range(units, whole, -1) if n <= most and units % n == n % whole == 0)
  return next(fitting, whole)


def take(x: Array, layout: str, cut: Mapping[str, Part]) -> Array:
  """The part of an array whose leading axes `layout` names; an axis that is cut becomes as long as
  its side, or so many times longer as it was longer than the units. One of length 1 is shared.
  """
  view, starts, sizes = _view(x, layout, cut)
  taken = lax.dynamic_slice(view, starts, [size for pair in sizes for size in pair])
  return taken.reshape([math.prod(pair) for pair in sizes])


def put(x: Array, layout: str, cut: Mapping[str, Part], part: Array) -> Array:
  """The array with that part in its place."""
  view, starts, sizes = _view(x, layout, cut)
  part = part.astype(x.dtype).reshape([size for pair in sizes for size in pair])
  return lax.dynamic_update_slice(view, part, starts).reshape(x.shape)


def add(x: Array, layout: str, cut: Mapping[str, Part], part: Array) -> Array:
  """The array with that added to the part of it."""
  return put(x, layout, cut, take(x, layout, cut) + part)


def _view(
  x: Array, layout: str, cut: Mapping[str, Part]
) -> tuple[Array, list[Array], list[tuple[int, ...]]]:
  """The array with every axis that is cut as two, where the part begins, and its size by axis."""
  shape: list[int] = []
  starts: list[Array | int] = []
  sizes: list[tuple[int, ...]] = []
  names = layout.split()
  for axis, size in enumerate(x.shape):
    part = cut.get(names[axis]) if axis < len(names) and size > 1 else None
    if part is None:
      shape, starts, sizes = [*shape, size], [*starts, 0], [*sizes, (size,)]
      continue
    width = size // part.units
    shape += [part.side, size // part.side]
    starts += [0, part.index * width]
    sizes += [(part.side, width)]
  return x.reshape(shape), [jnp.asarray(start, jnp.int32) for start in starts], sizes
