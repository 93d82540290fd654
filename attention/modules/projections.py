"""Linear maps between the axes of a model: the only matrices that it has, besides the embedding."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from attention.modules import sharding


class Projection(nnx.Module):
  """A linear map from the last axes of `x`, without bias.

      out[..., outputs] = sum over inputs of x[..., inputs] kernel[inputs, outputs]

  The kernel is float32, normal with standard deviation scale / sqrt(number of inputs), and lies on
  the mesh as `names` say. It is cast to the dtype of `x`.
  """

  def __init__(
    self,
    inputs: Sequence[int],
    outputs: Sequence[int],
    names: Sequence[str | None],
    *,
    scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    self.num_inputs = len(inputs)
    shape, where = (*inputs, *outputs), sharding.spec(*names)
    kernel = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=where)
    self.kernel = nnx.Param(kernel * (scale / math.sqrt(math.prod(inputs))))

  def __call__(
    self, x: Float[Array, "..."], *, out_sharding: NamedSharding | None = None
  ) -> Float[Array, "..."]:
    """Maps `x`; `out_sharding` is needed where an axis that is summed over is cut by the mesh."""
    kernel = self.kernel[...].astype(x.dtype)
    return jnp.tensordot(x, kernel, self.num_inputs, out_sharding=out_sharding)
