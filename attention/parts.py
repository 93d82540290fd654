"""The rows of a batch and their heads, worked through part by part, so that a part fits a cache.

An axis of n units is seen as `side` equal runs, and a part has one unit of each: part i those at i
of every run. A mesh cuts an axis into equal runs too. So where `side` is a multiple of its devices
every device has its own share of every part, and no loop walks from one device to the next; a loop
over single units would make XLA gather the axis on all of them. `read` and `top_k` likewise leave
rows and heads where a mesh has them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from attention import chips


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


def each(function: Callable[..., Any], *arrays: Any) -> Any:
  """What a function of one row and head makes of each, arrays `B N ...` to arrays `B N ...`: one
  after another, but those together that the mesh in context may have on different devices.
  """
  B, N = arrays[0].shape[:2]
  rows, heads = (side(units, devices() or 1, 1) for units in (B, N))

  def apart(x):
    x = x.reshape(rows, B // rows, heads, N // heads, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 1)).reshape(-1, rows, heads, *x.shape[4:])

  def together(x):
    x = x.reshape(B // rows, N // heads, rows, heads, *x.shape[3:])
    return jnp.moveaxis(x, (0, 1), (1, 3)).reshape(B, N, *x.shape[4:])

  part = jax.vmap(jax.vmap(function))
  return jax.tree.map(together, lax.map(lambda x: part(*x), jax.tree.map(apart, arrays)))


@custom_vmap
def anywhere(condition: Array) -> Array:
  """Whether it holds in one place, under `vmap` one answer for all rows: so of a `lax.cond` that
  reads it one branch runs and not both.
  """
  return condition.any()


@anywhere.def_vmap
def _anywhere_of_rows(size, batched, condition):
  del size, batched
  return anywhere(condition.any(axis=0)), False


def read(x: Array, index: Array) -> Array:
  """`B S K ...` at tokens, `B T N C` or `B T N`; N / K heads read each of K. Rows and heads are
  axes of the gather: were they indices, a mesh that cuts them would have all of x everywhere.
  """
  (B, T, N), K = index.shape[:3], x.shape[2]
  grouped = index.reshape(B, T, K, N // K, *index.shape[3:])
  head = jax.vmap(lambda x, index: x[index], in_axes=1, out_axes=1)
  return jax.vmap(head)(x, grouped).reshape(*index.shape, *x.shape[3:])


def top_k(x: Array, k: int) -> tuple[Array, Array]:
  """`lax.top_k`, of whose operand XLA's CPU compiler would have all on every device of a mesh. The
  approximate one of recall 1 becomes the same program there, and stays cut.
  """
  if chips.current().platform != "cpu":
    return lax.top_k(x, k)
  if k == 1:  # of equal ones the first, as ever
    return x.max(-1, keepdims=True), lax.argmax(x, x.ndim - 1, jnp.int32)[..., None]
  best, index = lax.approx_max_k(x, k, recall_target=1.0)
  return best, index


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
