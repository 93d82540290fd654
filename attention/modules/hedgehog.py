"""The mixer that learns its feature map: Hedgehog."""

import jax
import jax.numpy as jnp
from flax import nnx

from attention.modules import sharding
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism
from attention.modules.mixer import Attention


class HedgehogAttention(Attention):
  """Linear attention with a learned feature map for each head's queries, and one for its keys.

      phi(x) = [softmax(W x), softmax(-W x)]         W begins as the identity

  Zhang et al. 2024, "The Hedgehog & the Porcupine", section 4, https://arxiv.org/abs/2402.04347. W
  is here; the softmaxes are the mechanism's feature map.
  """

  def __init__(
    self, config: DecoderConfig, mechanism: Mechanism, *, layer: int = 0, rngs: nnx.Rngs
  ):
    super().__init__(config, mechanism, layer=layer, rngs=rngs)
    heads, where = self.heads(config), sharding.spec("model_heads", None, None)

    def identity(num_heads):
      shape = (num_heads, heads.key_dim, heads.key_dim)
      kernel = jnp.zeros(shape, jnp.float32, out_sharding=where)
      return nnx.Param(kernel + jnp.eye(heads.key_dim)[None])

    self.query_map, self.key_map = identity(heads.q), identity(heads.k)

  def constants(self) -> dict[str, jax.Array]:
    """The matrices, [N H H] and [K H H]."""
    return {"query_map": self.query_map[...], "key_map": self.key_map[...]}

  @staticmethod
  def around(run, q, k, v, **inputs):
    """Applies the matrices."""

    def turned(x, w):
      return jnp.einsum("...nh,nmh->...nm", x, w.astype(x.dtype))

    return run(turned(q, inputs["query_map"]), turned(k, inputs["key_map"]), v)
