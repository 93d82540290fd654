"""Candidates for a softmax over a few keys, cheap for planar heads: Fenwick's blocks.

    C[t] = {s: s // R = t // R, s <= t}  +  {argmax over block b of q[t] . k[s]: b a bit of t // R}

A prefix is a binary number of blocks of R keys, so it is cut into at most log2(T / R) blocks whose
sizes are powers of two, as in a Fenwick tree (1994, https://doi.org/10.1002/spe.4380240306). Of
each only the best key is taken, beside the keys of the query's own block. These blocks are the left
halves that the bulk form of hard-max attention asks anyway (`hardmax_levels`): O(T log^2 T) time.
The best key of all is among them, but for rounding and for what `hardmax_levels.off_axis` says of
queries along x; the second best is not if it shares a block with the best.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention import hardmax_levels, parts


@functools.partial(jax.jit, static_argnames="recent")
def candidates(
  q: Float[Array, "B T N 2"], k: Float[Array, "B T K 2"], *, recent: int
) -> Int[Array, "B T N C"]:
  """All different, -1 for none; C is `recent` and one for each power of two above.

  `recent`, R above, is a power of two, at least `hardmax_levels.WIDTH`. No gradient.
  """
  B, T, N, _ = q.shape
  k = jnp.repeat(k, N // k.shape[2], axis=2)
  q, k = (x.swapaxes(1, 2) for x in lax.stop_gradient((q, k)))
  winners = parts.each(functools.partial(_block_winners, recent=recent), q, k).swapaxes(1, 2)
  t = jnp.arange(T, dtype=jnp.int32)[:, None]
  own = t // recent * recent + jnp.arange(recent, dtype=jnp.int32)[None]
  own = jnp.broadcast_to(jnp.where(own <= t, own, -1)[None, :, None], (B, T, N, recent))
  return jnp.concatenate([own, winners], -1)


def _block_winners(q: Array, k: Array, recent: int) -> Int[Array, "T C"]:
  """Of one head, the best key of each block before the query's own."""
  T = q.shape[0]
  size = 1 << max((T - 1).bit_length(), recent.bit_length())
  lowest = recent.bit_length() - 1

  def visit(found, level):
    return found.at[level.queries, level.bits - lowest].set(level.keys[level.best])

  problem = hardmax_levels.make_problem(hardmax_levels.off_axis(q), k, size)
  found = jnp.full((size, size.bit_length() - 1 - lowest), -1, jnp.int32)
  return hardmax_levels.fold(problem, visit, found, lowest)[:T]
