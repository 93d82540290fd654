"""What loops and custom derivatives need under `jax.shard_map`, where arrays vary over mesh axes or
do not.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def zero(tree: Any, dtype: Any = jnp.float32) -> Float[Array, ""]:
  """A zero that varies over the mesh axes over which any array of `tree` does.

  Inside `jax.shard_map` a loop must be handed a carry that varies as its result will; added to what
  a carry starts from, this makes it so. Nothing is read: the sums are over no elements.
  """
  none = (jnp.sum(x[:0]).astype(dtype) for x in jax.tree.leaves(tree))
  return sum(none, jnp.zeros((), dtype))


def together[T](tree: T) -> T:
  """The same values, each varying over every mesh axis over which any of them does.

  A custom derivative must return gradients that vary as its inputs did; JAX sums what this spread
  out.
  """
  return jax.tree.map(lambda x: x + zero(tree, x.dtype), tree)
