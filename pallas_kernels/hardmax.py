"""What a hard-max kernel finds, on any chip, and the arithmetic that they share.

`hardmax_hopper.py` and `hardmax_tpu.py` have a `BLOCK`, (block_q, block_k) in which visits are to
be counted, and the same two functions:

    unsupported(T, S, H) -> str | None
    winners(q, k, rule, by_query) -> Winners, `B N T`

of q `B N H T` and k `B K H S`, float32. `rule(q_idx, k_idx)` says which pairs of a mixed block are
allowed, elementwise on tiles of one shape `q k`; only those are asked, so the visits must call a
last block of keys that is not whole mixed, and the rule forbid what is beyond. `by_query` is
`flash.Visits` of all rows and heads.
"""

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

MAX_WIDTH = 8
"""Coordinates of a key: each is a product and a sum of the vector unit."""


class Winners(NamedTuple):
  """Of some keys, which are a query's best."""

  score: Array
  """The greatest score, float32; -inf where there is no key."""
  count: Array
  """How many keys have it, int32."""
  last: Array
  """The last of them, int32."""

  def checked(self) -> "Winners":
    """No key where the score is -inf, which is what a forbidden pair has."""
    some = self.score > -jnp.inf
    return Winners(self.score, jnp.where(some, self.count, 0), jnp.where(some, self.last, -1))


def too_wide(H: int) -> str | None:
  """Why heads of this width are refused, or None."""
  return f"head_dim {H} is more than {MAX_WIDTH}" if H > MAX_WIDTH else None


def score(pairs: Iterable[tuple[Array, Array]]) -> Array:
  """The dot product of (query, key) coordinates, every product rounded, added from the first to the
  last: that of `attention.plane`, but for the sign of 0.

  Compilers fuse a product into the sum behind it, which would not round it. Here that sum is with
  0, so that the fused operation is the product, rounded, at the same price.
  """
  return functools.reduce(operator.add, (q * k + 0.0 for q, k in pairs))
