"""Griffin's recurrent block: a convolution and a real-gated linear recurrent unit, the RG-LRU."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention.modules import sharding
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism
from attention.modules.mixer import Attention, Heads

SHARPNESS = 8.0
RADII = (0.9, 0.999)
# 1 - a^2 where float32 no longer tells a from 1: the square root's slope ends here, at 1000.
LEAST = 2.5e-7


def write_strength(log_a: Float[Array, "..."]) -> Float[Array, "..."]:
  """sqrt(1 - a^2), which keeps the variance of the state; its gradient is finite at a = 1."""
  return jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), LEAST))


class RecurrentBlock(Attention):
  """The RG-LRU with what Griffin puts around it.

      x   = conv(x W_x) + b                                  4 taps
      r,i = sigmoid(x W_a + b_a), sigmoid(x W_i + b_i)       one square block per head
      a   = exp(-8 softplus(L) r)
      h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)
      out = (gelu(x W_g) * h) W_o

  De et al. 2024, "Griffin", section 2.3 and eq. 1 to 4, https://arxiv.org/abs/2402.19427. To the
  mechanism gelu(x W_g) is the query, sqrt(1 - a^2) i the key, and x the value.
  """

  TAPS = 4
  CONVOLVED = (False, False, True)

  def __init__(
    self, config: DecoderConfig, mechanism: Mechanism, *, layer: int = 0, rngs: nnx.Rngs
  ):
    super().__init__(config, mechanism, layer=layer, rngs=rngs)
    N, H = config.num_heads, config.head_width
    wide = sharding.spec("model_heads", None)
    square = sharding.spec("model_heads", None, None)

    def block():
      kernel = jax.random.normal(rngs.params(), (N, H, H), jnp.float32, out_sharding=square)
      return nnx.Param(kernel / math.sqrt(H))

    def zeros():
      return nnx.Param(jnp.zeros((N, H), jnp.float32, out_sharding=wide))

    self.gate_a, self.gate_i = block(), block()
    self.bias_a, self.bias_i, self.bias_x = zeros(), zeros(), zeros()
    kept = jax.random.uniform(rngs.params(), (N, H), jnp.float32, *RADII, out_sharding=wide)
    self.rate = nnx.Param(jnp.log(jnp.expm1(-jnp.log(kept) / SHARPNESS)))  # a^8 is `kept`

  @classmethod
  def heads(cls, config: DecoderConfig) -> Heads:
    """As many heads of the gate as of the recurrence, and no keys."""
    return Heads(config.num_heads, 0, config.num_heads, config.head_width, config.head_width)

  def constants(self) -> dict[str, jax.Array]:
    """What is learned per head."""
    names = ("gate_a", "gate_i", "bias_a", "bias_i", "bias_x", "rate")
    return {name: getattr(self, name)[...] for name in names}

  @staticmethod
  def around(run, q, k, v, **inputs):
    """The gates, made of the convolved input."""
    del k

    def everywhere(x):
      return x.reshape((1,) * (v.ndim - 2) + x.shape)

    x = v + everywhere(inputs["bias_x"]).astype(v.dtype)

    def gate(name):
      weight, bias = inputs[f"gate_{name}"].astype(x.dtype), inputs[f"bias_{name}"]
      logit = jnp.einsum("...nh,nhm->...nm", x, weight).astype(jnp.float32)
      return jax.nn.sigmoid(logit + everywhere(bias))

    log_a = -SHARPNESS * everywhere(jax.nn.softplus(inputs["rate"])) * gate("a")
    write = write_strength(log_a) * gate("i")
    return run(jax.nn.gelu(q), write.astype(v.dtype), x, log_decay=log_a)
