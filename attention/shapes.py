"""What calls of softmax and hard-max attention must fit, checked before anything is computed."""

import jax
import jax.numpy as jnp

from attention import masks
from attention.masks import Mask

Array = jax.Array


def agree(query: Array, key: Array, value: Array) -> None:
  """ValueError unless `B T N H`, `B S K H` and `B S K h` fit each other."""
  shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
  if not query.ndim == key.ndim == value.ndim == 4:
    raise ValueError(f"query, key and value must all have four axes: {shapes}")
  if key.shape[:3] != value.shape[:3]:
    raise ValueError(f"key and value must agree in batch, length and heads: {shapes}")
  if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
    raise ValueError(f"query and key must agree in batch and head width: {shapes}")
  if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
    raise ValueError(f"key heads must divide query heads: N={query.shape[2]}, K={key.shape[2]}")


def batched(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
  """The three with a batch axis, checked against each other."""
  shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
  if not query.ndim == key.ndim == value.ndim or query.ndim not in (3, 4):
    raise ValueError(
      f"query, key and value must all be [B, T, N, H] or all [T, N, H], not {shapes}"
    )
  if (
    query.dtype != key.dtype
    or key.dtype != value.dtype
    or not jnp.issubdtype(query.dtype, jnp.floating)
  ):
    dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}"
    raise ValueError(f"query, key and value must have one floating dtype, not {dtypes}")
  if query.ndim == 3:
    query, key, value = query[None], key[None], value[None]
  agree(query, key, value)
  return query, key, value


def broadcastable(name: str, x: Array, shape: tuple[int, int, int, int]) -> Array:
  """`x` with four axes, each of the size in `shape` or 1."""
  axes = (1,) * (4 - x.ndim) + x.shape
  if len(axes) != 4 or any(size not in (1, full) for size, full in zip(axes, shape, strict=True)):
    raise ValueError(f"{name} must broadcast to [B, N, T, S] = {list(shape)}, not {list(x.shape)}")
  return x.reshape(axes)


def call_mask(mask: Mask | Array | None, is_causal: bool, sizes: tuple[int, int, int, int]) -> Mask:
  """The mask of a call, everybody for None, checked against its B, N, T and S."""
  if mask is None:
    return masks.causal() if is_causal else masks.everything()
  if not isinstance(mask, Mask):
    mask = masks.from_array(broadcastable("mask", jnp.asarray(mask), sizes))
  mask.check(*sizes)
  return mask & masks.causal() if is_causal else mask


def row_lengths(lengths: Array | None, B: int, T: int) -> Array:
  """How many of T tokens each of B rows has, int32: `lengths`, or for None all of them.

  Raises:
    ValueError: `lengths` are not B integers.
  """
  if lengths is None:
    return jnp.full((B,), T, jnp.int32)
  if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(
      f"lengths must be integers of shape [{B}], not {lengths.dtype}{list(lengths.shape)}"
    )
  return lengths.astype(jnp.int32)


def check_positive(name: str, value: float | Array) -> None:
  """Raises ValueError unless the value is above 0, or traced, so that nobody knows it yet."""
  if not isinstance(value, jax.core.Tracer) and not value > 0:
    raise ValueError(f"{name} must be greater than 0, not {value}")
