"""The part of a block that mixes channels."""

import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from attention.modules import sharding
from attention.modules.config import DecoderConfig
from attention.modules.projections import Projection


class GatedMLP(nnx.Module):
  """SwiGLU: a hidden layer whose channels are gated by a second one.

      out = (silu(x W_gate) * (x W_up)) W_down

  Shazeer 2020, eq. 6, https://arxiv.org/abs/2002.05202.
  """

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    D, F = config.width, config.hidden_width
    sharding.check_divisible("mlp_width", F, "mlp")
    residual = 1 / math.sqrt(2 * config.num_layers)
    self.gate = Projection((D,), (F,), ("embed", "mlp"), rngs=rngs)
    self.up = Projection((D,), (F,), ("embed", "mlp"), rngs=rngs)
    self.down = Projection((F,), (D,), ("mlp", "embed"), scale=residual, rngs=rngs)

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Mixes the channels of each token."""
    hidden = jax.nn.silu(self.gate(x)) * self.up(x)
    return self.down(hidden, out_sharding=sharding.like(x))
