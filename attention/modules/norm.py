"""Root-mean-square normalization."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention.modules import sharding


class RMSNorm(nnx.Module):
  """Scales the last axes to unit root mean square, then by a learned factor per channel.

      out = x / sqrt(mean(x^2) + epsilon) * scale

  The mean is over as many axes as `shape` has: RMSNorm(h) normalizes each head alone.

  Zhang and Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467. Statistics are float32.
  """

  def __init__(self, *shape: int, epsilon: float = 1e-6):
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones(shape, jnp.float32, out_sharding=sharding.spec(None)))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalizes the last axes; keeps the dtype."""
    y, shape = x.astype(jnp.float32), self.scale.shape
    axes = tuple(range(-len(shape), 0))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + self.epsilon)
    scale = self.scale[...].reshape((1,) * (x.ndim - len(shape)) + shape)
    return (y * scale).astype(x.dtype)
