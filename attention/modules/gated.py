"""Mixers that normalize and gate what a mechanism reads; gated linear attention is one of them."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention.modules import sharding
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism
from attention.modules.mixer import Attention, Heads
from attention.modules.norm import RMSNorm
from attention.modules.projections import Projection

RANK = 16
TEMPERATURE = 16.0


class GatedAttention(Attention):
  """`Attention` whose heads are normalized, and gated by the input, before they are joined.

      out = (gate(x W_r) * rms_norm(mechanism(q, k, v, ...))) W_o

  The norm stands for the denominator that these mechanisms do without (Qin et al. 2022, "The Devil
  in Linear Transformer", https://arxiv.org/abs/2210.10340).
  """

  GATE: ClassVar[Literal["silu", "sigmoid", "none"]] = "silu"
  NORMALIZED: ClassVar[Literal["head", "heads"]] = "head"
  """What is brought to a root mean square of one: each head, or all heads of a token together."""

  def __init__(
    self, config: DecoderConfig, mechanism: Mechanism, *, layer: int = 0, rngs: nnx.Rngs
  ):
    super().__init__(config, mechanism, layer=layer, rngs=rngs)
    heads = self.heads(config)
    shape, names = (heads.out, heads.value_dim), ("embed", "model_heads", None)
    self.gate = (
      None if self.GATE == "none" else Projection((config.width,), shape, names, rngs=rngs)
    )
    self.norm = RMSNorm(*(shape if self.NORMALIZED == "heads" else shape[1:]))

  def readout(self, out: Float[Array, "*B N h"], x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalizes, gates, and projects back to the model's width."""
    out = self.norm(out)
    if self.gate is not None:
      gate = self.gate(x)
      out = out * (jax.nn.silu(gate) if self.GATE == "silu" else jax.nn.sigmoid(gate))
    return super().readout(out, x)


class GatedLinearAttention(GatedAttention):
  """Linear attention with a decay per channel, made from the input.

      log_decay = log_sigmoid((x W_1) W_2 + b) / 16                       (x W_1 has rank 16)
      out       = (silu(x W_r) * rms_norm(mechanism(q / sqrt(H), k, v, log_decay))) W_o

  Queries and keys have half the width of the values. Yang et al. 2023, "Gated Linear Attention
  Transformers", section 4.4, https://arxiv.org/abs/2312.06635.
  """

  def __init__(
    self, config: DecoderConfig, mechanism: Mechanism, *, layer: int = 0, rngs: nnx.Rngs
  ):
    super().__init__(config, mechanism, layer=layer, rngs=rngs)
    shape, names = (config.num_heads, self.heads(config).key_dim), (None, "model_heads", None)
    self.decay_down = Projection((config.width,), (RANK,), ("embed", None), rngs=rngs)
    self.decay_up = Projection((RANK,), shape, names, rngs=rngs)
    self.decay_bias = nnx.Param(
      jnp.zeros(shape, jnp.float32, out_sharding=sharding.spec("model_heads", None))
    )

  @classmethod
  def heads(cls, config: DecoderConfig) -> Heads:
    """Keys half as wide as values."""
    heads = super().heads(config)
    return heads._replace(key_dim=max(1, heads.key_dim // 2))

  def inputs(self, x: Float[Array, "*B D"]) -> dict[str, jax.Array]:
    """The log decay of each token, head and channel; at most 0, float32."""
    logit = self.decay_up(self.decay_down(x)).astype(jnp.float32)
    bias = self.decay_bias[...].reshape((1,) * (x.ndim - 1) + self.decay_bias.shape)
    return {"log_decay": jax.nn.log_sigmoid(logit + bias) / TEMPERATURE}

  @staticmethod
  def around(run, q, k, v, **inputs):
    """Scales the queries."""
    return run(q * q.shape[-1] ** -0.5, k, v, **inputs)
