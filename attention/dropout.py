"""Dropout of attention probabilities (Srivastava et al. 2014, section 4,
https://jmlr.org/papers/v15/srivastava14a.html; in attention, Vaswani et al. 2017, section 5.4):

    out[t] = sum_s keep[t, s] p[t, s] v[s] / (1 - rate)

with bits that are a function of (seed, query, key): every implementation, tiling and sharding drops
the same pairs, and the backward pass recomputes what it would otherwise have to keep.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
  """What a call drops. Make it outside of `shard_map`: the seeds are sharded as the heads are."""

  rate: float = dataclasses.field(metadata={"static": True})
  seeds: Int[Array, "B N"]
  """One of each batch row and query head."""


def make_dropout(rate: float, key: Array, batch: int, num_heads: int) -> Dropout:
  """Dropout at `rate` with seeds drawn from a random key.

  Raises:
    ValueError: a rate outside of 0 <= rate < 1.
  """
  if not 0.0 <= rate < 1.0:
    raise ValueError(f"dropout rate must be in [0, 1), not {rate}")
  return Dropout(rate, jax.random.bits(key, (batch, num_heads), jnp.uint32).view(jnp.int32))


def keep(
  seeds: Int[Array, "*#R 1 1"],
  q_idx: Int[Array, "*#R q 1"],
  k_idx: Int[Array, "*#R 1 k"],
  *,
  rate: float,
) -> Bool[Array, "*R q k"]:
  """Which probabilities of some queries and keys stay."""
  return tiles.keep(seeds, q_idx, k_idx, rate=rate)


def kept_array(dropout: Dropout, T: int, S: int) -> Bool[Array, "B N T S"]:
  """All of them at once, O(T S): for references and dense forms."""
  q_idx, k_idx = (jnp.arange(length, dtype=jnp.int32) for length in (T, S))
  seeds = dropout.seeds[..., None, None]
  return keep(seeds, q_idx[None, None, :, None], k_idx[None, None, None], rate=dropout.rate)
