"""What a hard-max kernel finds, on any chip, and the arithmetic that they share.

`hardmax_hopper.py` and `hardmax_tpu.py` have a `BLOCK`, (block_q, block_k) in which visits are to
be counted, and

    winners(q, k, rule, by_query) -> Winners

of q `B N H T` and k `B K H S`, float32, H at most `MAX_WIDTH`. `rule(q_idx, k_idx)` says which
pairs of a mixed block are allowed, elementwise; only those are asked, so it must forbid keys from S
on wherever the last block of keys is not whole. `by_query` is `flash.Visits` of one row and head.
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


def score(pairs: Iterable[tuple[Array, Array]]) -> Array:
  """The dot product of (query, key) coordinates, every product rounded, added from the first to the
  last: that of `attention.plane`, but for the sign of 0.

  Compilers fuse a product into the sum behind it, which would not round it. Here that sum is with
  0, so that the fused operation is the product, rounded, at the same price.
  """
  return functools.reduce(operator.add, (q * k + 0.0 for q, k in pairs))
