"""The keys and values of what was read, in the order of time: the decoding state of mechanisms that
look at all of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention import masks, shapes
from attention.masks import Mask


class Cache(NamedTuple):
  """Position p lies in slot p. The caller gives room for all that will come; more is dropped."""

  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K h"]
  length: Int[Array, " B"]
  """Tokens read."""


def make_cache(
  batch: int, *, num_kv_heads: int, head_dim: int, value_dim: int, max_length: int, dtype: Any
) -> Cache:
  """Of no token, with room for `max_length`."""
  shape = (batch, max_length, num_kv_heads)
  length = jnp.zeros(batch, jnp.int32)
  return Cache(jnp.zeros((*shape, head_dim), dtype), jnp.zeros((*shape, value_dim), dtype), length)


def append(
  cache: Cache,
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K h"],
  lengths: Int[Array, " B"] | None,
) -> tuple[Cache, Int[Array, "B T"], Mask]:
  """The cache with the first `lengths[b]` of T tokens after those of row b (None: all of them), the
  positions of the T tokens, and who of them sees which slot.
  """
  B, T = k.shape[:2]
  lengths = shapes.row_lengths(lengths, B, T)
  steps = jnp.arange(T, dtype=jnp.int32)[None]
  positions = cache.length[:, None] + steps
  slots = jnp.where(steps < lengths[:, None], positions, cache.key.shape[1])  # no slot: dropped
  rows = jnp.arange(B)[:, None]
  cache = Cache(
    cache.key.at[rows, slots].set(k.astype(cache.key.dtype), mode="drop"),
    cache.value.at[rows, slots].set(v.astype(cache.value.dtype), mode="drop"),
    cache.length + lengths,
  )
  # XLA would fuse the write into what reads it, and copy the whole cache to be able to.
  cache = jax.lax.optimization_barrier(cache)
  slots = jnp.broadcast_to(jnp.arange(cache.key.shape[1], dtype=jnp.int32), cache.key.shape[:2])
  mask = masks.positions(positions, jnp.where(slots < cache.length[:, None], slots, -1))
  return cache, positions, mask
