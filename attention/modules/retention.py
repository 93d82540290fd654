"""Mixers whose heads forget at a constant rate: RetNet's retention and Lightning attention."""

import jax
import jax.numpy as jnp

from attention.modules.config import DecoderConfig
from attention.modules.gated import GatedAttention
from attention.modules.mixer import Heads


def retention_decay(num_heads: int) -> jax.Array:
  """RetNet's log decays, log(1 - 2^(-5 - n)) of head n: [N]."""
  return jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(num_heads, dtype=jnp.float32)))


def lightning_decay(num_heads: int, layer: int, num_layers: int) -> jax.Array:
  """Lightning attention's log decays, -8 n / N (1 - layer / L) of head n: [N]."""
  slope = 8.0 / num_heads * (1 - layer / num_layers)
  return -slope * jnp.arange(num_heads, dtype=jnp.float32)


class Retention(GatedAttention):
  """Multi-scale retention: rotated queries and keys, values twice as wide, a decay for each head.

      decay of head n = 1 - 2^(-5 - n)
      out             = (silu(x W_g) * rms_norm(mechanism(q, k / sqrt(H), v))) W_o

  Sun et al. 2023, "Retentive Network", eq. 6 to 8, https://arxiv.org/abs/2307.08621. xPos's decay
  is the heads' own; its rotation is `rotary`. The paper's rescaling of retention scores by their
  sums is what the norm of a head undoes, and is left out.
  """

  @classmethod
  def heads(cls, config: DecoderConfig) -> Heads:
    """Values twice as wide as keys."""
    heads = super().heads(config)
    return heads._replace(value_dim=2 * heads.value_dim)

  def constants(self) -> dict[str, jax.Array]:
    """The log decays of the heads."""
    return {"log_decay": retention_decay(self.config.num_heads)}

  @staticmethod
  def around(run, q, k, v, **inputs):
    """Scales the keys."""
    return run(q, k * k.shape[-1] ** -0.5, v, **inputs)


class LightningAttention(GatedAttention):
  """Linear attention with a constant slope per head, less steep in deeper layers.

      log decay of head n in layer l = -8 n / N (1 - l / L)
      out = (sigmoid(x W_g) * rms_norm(mechanism(silu(q), silu(k), silu(v)))) W_o

  Qin et al. 2024, "Lightning Attention-2", https://arxiv.org/abs/2401.04658; the slopes are
  TransNormerLLM's (https://arxiv.org/abs/2307.14995, section 3.1), the activations, the norm over
  all heads and the gate are MiniMax-01's (https://arxiv.org/abs/2501.08313, section 2.2).
  """

  GATE = "sigmoid"
  NORMALIZED = "heads"

  def constants(self) -> dict[str, jax.Array]:
    """The log decays of the heads."""
    decay = lightning_decay(self.config.num_heads, self.layer, self.config.num_layers)
    return {"log_decay": decay}

  @staticmethod
  def around(run, q, k, v, **inputs):
    """An activation on each of q, k and v."""
    return run(*map(jax.nn.silu, (q, k, v)), **inputs)
