"""The mixer of HGRN2: what a channel forgets is what it makes room for."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from attention.modules import sharding
from attention.modules.config import DecoderConfig
from attention.modules.gated import GatedAttention
from attention.modules.mechanism import Mechanism


class HGRN2(GatedAttention):
  """A gated linear recurrence whose state is expanded to a matrix; keys are 1 - forget gate.

      f   = b + (1 - b) sigmoid(x W_f)       b: a channel's lower bound, 0 in the first layer
      out = rms_norm(mechanism(silu(q), 1 - f, v, log_decay=log f)) W_o

  Qin et al. 2024, "HGRN2", eq. 6 and section 3.1, https://arxiv.org/abs/2404.07904. The paper's
  bounds are cumulative sums, over the layers, of a softmax that all layers share. Here modules
  share nothing: each layer learns the logit of its own bound, which starts where that sum does, at
  l / L in layer l.
  """

  GATE = "none"
  NORMALIZED = "heads"

  def __init__(
    self, config: DecoderConfig, mechanism: Mechanism, *, layer: int = 0, rngs: nnx.Rngs
  ):
    super().__init__(config, mechanism, layer=layer, rngs=rngs)
    if layer:
      share = layer / config.num_layers
      shape, where = (config.kv_heads, config.head_width), sharding.spec("model_heads", None)
      bound = jnp.full(shape, math.log(share / (1 - share)), jnp.float32, out_sharding=where)
      self.bound = nnx.Param(bound)

  def constants(self) -> dict[str, jax.Array]:
    """The logits of the lower bounds, [K H]."""
    return {"bound": self.bound[...]} if self.layer else {}

  @staticmethod
  def around(run, q, k, v, **inputs):
    """Keys and decays of the forget gate's logits, in logarithms: f near 1 loses no digits."""
    logit, bound = k.astype(jnp.float32), inputs.get("bound")
    log_f, kept = jax.nn.log_sigmoid(logit), jax.nn.sigmoid(-logit)
    if bound is not None:
      bound = bound.reshape((1,) * (k.ndim - 2) + bound.shape)
      log_f = jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + log_f)
      kept = jax.nn.sigmoid(-bound) * kept
      log_f = jnp.where(kept < 0.5, jnp.log1p(-jnp.minimum(kept, 0.5)), log_f)
    log_f = jnp.repeat(log_f, q.shape[-2] // k.shape[-2], axis=-2)
    return run(jax.nn.silu(q), kept.astype(v.dtype), v, log_decay=log_f)
