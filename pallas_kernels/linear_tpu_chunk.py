"""A chunk of one head as the kernels of a TPU read it, whatever its decays are."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import linear_tpu_channel, linear_tpu_tiles
from pallas_kernels.linear_tiles import Array
from pallas_kernels.linear_tpu_tiles import Exponents, Faded, Shape, columns


class Refs(NamedTuple):
  """What every kernel reads; `g` only with decays per channel."""

  q: Any
  k: Any
  v: Any
  numbers: Any
  g: Any = None


def decays(refs: Refs, head: int, shape: Shape) -> Array | Exponents:
  """Of a head of a step: per channel as they are, per token as exponents."""
  if refs.g is not None:
    return columns(refs.g, head, 1, shape.M)
  return linear_tpu_tiles.exponents(refs.numbers[head])


def keys(refs: Refs, head: int, shape: Shape) -> Array:
  """In float32, as decays are put in there."""
  return columns(refs.k, head, shape.ratios[1], shape.M).astype(jnp.float32)


def queries(refs: Refs, head: int, shape: Shape) -> Array:
  """In float32."""
  return columns(refs.q, head, shape.ratios[0], shape.M).astype(jnp.float32)


def values(refs: Refs, head: int, shape: Shape) -> Array:
  """As they are."""
  return columns(refs.v, head, shape.ratios[2], shape.h)


def faded(q: Array, k: Array, g: Array | Exponents, dtype: Any) -> Faded:
  """The chunk with its decays put in."""
  if isinstance(g, Exponents):
    return linear_tpu_tiles.faded(q, k, g, dtype)
  return linear_tpu_channel.faded(q, k, g, dtype)


def written(k: Array, g: Array | Exponents) -> tuple[Array, Array]:
  """(keys as they write the state that leaves, its fading)."""
  if isinstance(g, Exponents):
    return linear_tpu_tiles.written(k, g)
  return linear_tpu_channel.written(k, g)
