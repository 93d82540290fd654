"""The mixer of gated linear attention: each channel learns when to forget."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention.modules import sharding
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism
from attention.modules.mixer import Attention
from attention.modules.norm import RMSNorm
from attention.modules.projections import Projection

RANK = 16
TEMPERATURE = 16.0


class GatedAttention(Attention):
  """`Attention` with a decay made from the input, and a normalized, gated output.

      log_decay = log_sigmoid((x W_1) W_2 + b) / 16                       (x W_1 has rank 16)
      out       = (silu(x W_r) * rms_norm(mechanism(q, k, v, log_decay))) W_o

  Yang et al. 2023, "Gated Linear Attention Transformers", section 4.4, https://arxiv.org/abs/2312.06635.
  """

  def __init__(self, config: DecoderConfig, mechanism: Mechanism, *, rngs: nnx.Rngs):
    super().__init__(config, mechanism, rngs=rngs)
    D, N, H = config.width, config.num_heads, config.head_width
    heads = (None, "model_heads", None)
    self.decay_down = Projection((D,), (RANK,), ("embed", None), rngs=rngs)
    self.decay_up = Projection((RANK,), (N, H), heads, rngs=rngs)
    bias = jnp.zeros((N, H), jnp.float32, out_sharding=sharding.spec("model_heads", None))
    self.decay_bias = nnx.Param(bias)
    self.gate = Projection((D,), (N, H), ("embed", "model_heads", None), rngs=rngs)
    self.norm = RMSNorm(H)

  def inputs(self, x: Float[Array, "*B D"]) -> dict[str, jax.Array]:
    """The log decay of each token, head and channel; at most 0, float32."""
    logit = self.decay_up(self.decay_down(x)).astype(jnp.float32)
    bias = self.decay_bias[...].reshape((1,) * (x.ndim - 1) + self.decay_bias.shape)
    return {"log_decay": jax.nn.log_sigmoid(logit + bias) / TEMPERATURE}

  def readout(self, out: Float[Array, "*B N h"], x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalizes each head, gates it, and projects back to the model's width."""
    return super().readout(jax.nn.silu(self.gate(x)) * self.norm(out), x)
