"""The arithmetic of hard-max attention, and of heads whose keys are points in the plane.

    score = rounded(q_1 k_1) + rounded(q_2 k_2) + ...

A tie is an equality of floats, so every form must round as the others do. Compilers contract `a b +
c d` into a fused multiply-add, or not, loop by loop, and a matrix product adds in an order of its
own; `score` forbids both, and equals NumPy's elementwise float32 bit for bit, but that a product
below float32's normal range may become 0. What is here is elementwise and small.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt

from attention.dispatch import suggest

TIES = ("average", "latest")
"""Of several best keys: the mean of their values, or the last one's."""
_UNROLLED = 8
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


class Direction(NamedTuple):
  """A query, made fit for the upper hull: a point with y > 0 and its slope."""

  x: Array
  y: Array
  lower: Bool[Array, "*T"]
  """Whether it was turned around, so that its keys must be too: its y was negative."""
  slope: Array
  """x / y: of two keys, the one with the greater x gains as the slope grows."""
  axis: Bool[Array, "*T"]
  """Whether y is 0, so that no hull is needed; (1, 0) stands here instead."""


def check_ties(ties: str) -> None:
  """ValueError unless it is one of `TIES`."""
  if ties not in TIES:
    raise ValueError(f"ties={ties!r} is unknown; {suggest(ties, TIES)}")


def check_count(name: str, value: int) -> None:
  """ValueError unless it is an integer of at least 1."""
  if not isinstance(value, int | np.integer) or value < 1:
    raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")


def score(query: tuple[Array, ...], key: tuple[Array, ...]) -> Array:
  """The dot product of two vectors given coordinate by coordinate, every product rounded, added
  from the first to the last. The coordinates broadcast.
  """
  nothing = _hidden_zero(query[0])
  products = [_rounded(q * k, nothing) for q, k in zip(query, key, strict=True)]
  total = products[0]
  for product in products[1:]:
    total = total + product
  return total


def scores(queries: Array, keys: Array) -> Array:
  """`score` of vectors: `... q H` and `... k H` to `... q k`, in O(q k) memory for any H."""
  H = queries.shape[-1]
  q, k = jnp.moveaxis(queries, -1, 0)[..., None], jnp.moveaxis(keys, -1, 0)[..., None, :]
  if H <= _UNROLLED:
    return score(tuple(q), tuple(k))
  nothing = _hidden_zero(queries)
  add = lambda c, total: total + _rounded(q[c] * k[c], nothing)
  return lax.fori_loop(1, H, add, _rounded(q[0] * k[0], nothing))


def ordered_bits(x: Float[Array, "*T"]) -> UInt[Array, "*T"]:
  """Unsigned integers in the order of these floats, which takes -0 for less than 0."""
  kind = _UNSIGNED[x.dtype.itemsize]
  bits = lax.bitcast_convert_type(x, kind)
  sign = jnp.asarray(1, kind) << (8 * x.dtype.itemsize - 1)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def from_ordered_bits(bits: UInt[Array, "*T"]) -> Float[Array, "*T"]:
  """The floats that `ordered_bits` numbered."""
  kinds = {jnp.dtype(jnp.uint32): jnp.float32, jnp.dtype(jnp.uint64): jnp.float64}
  sign = jnp.asarray(1, bits.dtype) << (8 * bits.dtype.itemsize - 1)
  return lax.bitcast_convert_type(jnp.where(bits >= sign, bits ^ sign, ~bits), kinds[bits.dtype])


def direction(x: Array, y: Array) -> Direction:
  """A query (x, y) as one of the upper half plane, where the best of keys sorted by (x, y) moves
  only to the right as the slope grows.
  """
  axis, lower = y == 0, y < 0
  x = jnp.where(axis, jnp.ones_like(x), jnp.where(lower, -x, x))
  y = jnp.where(axis, jnp.zeros_like(y), jnp.abs(y))
  slope = jnp.where(axis, jnp.full_like(x, jnp.inf), x / jnp.where(axis, jnp.ones_like(y), y))
  return Direction(x, y, lower, slope, axis)


def _rounded(product: Array, nothing: Array) -> Array:
  """`product`, seen by no compiler as one: between it and a sum is an operation on its bits."""
  bits = lax.bitcast_convert_type(product, nothing.dtype) ^ nothing
  return lax.bitcast_convert_type(bits, product.dtype)


def _hidden_zero(x: Array) -> Array:
  """An unsigned 0 that no compiler can know: a square is 0, 1 or 4 modulo 8, so no two of its last
  three bits are set, whatever the number's bits are, those of NaN included.
  """
  kind = _UNSIGNED[x.dtype.itemsize]
  if not x.size:
    return jnp.zeros((), kind)
  bits = lax.bitcast_convert_type(lax.stop_gradient(x)[(0,) * x.ndim], kind)
  square = bits * bits
  return square & (square >> 2) & 1
