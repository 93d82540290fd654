"""Score modifiers: what happens to q . k between the dot product and the softmax.

    score = cap tanh(scale q . k / cap) + bias - slope |q_idx - k_idx|

The cap bounds the scaled product (Gemma 2, section 2, https://arxiv.org/abs/2408.00118), the bias
and ALiBi (Press et al. 2021, section 3, https://arxiv.org/abs/2108.12409) come after it and are not
bounded. Masks come last: a masked score is -inf whatever it was. Every implementation uses this
meaning, in this order, and gradients reach the bias and the slopes.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Modifiers(NamedTuple):
  """The arrays that change scores; None where absent."""

  bias: Float[Array, "#B #N #T #S"] | None = None
  alibi_slopes: Float[Array, " N"] | None = None


def alibi_slopes(num_heads: int) -> Float[Array, " N"]:
  """The slopes of ALiBi, a geometric sequence from 2^(-8/N) to 2^-8 (exactly so where N is a power
  of two).
  """
  power = 2 ** int(np.floor(np.log2(num_heads)))
  slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
  between = 2.0 ** (-4.0 * np.arange(1, 2 * (num_heads - power), 2) / power)
  return jnp.asarray(np.concatenate([slopes, between]), jnp.float32)


def grouped(x: Array, num_kv_heads: int) -> Array:
  """Splits the head axis of `#B #N q k` into key heads and their queries: `#B K G q k`, or 1 1
  where N is 1.
  """
  B, N, T, S = x.shape
  return x[:, None] if N == 1 else x.reshape(B, num_kv_heads, N // num_kv_heads, T, S)


def modify(
  product: Float[Array, "B K G q k"],
  modifiers: Modifiers,
  q_idx: Int[Array, " q"],
  k_idx: Int[Array, " k"],
  *,
  scale: float,
  logit_cap: float | None,
) -> Float[Array, "B K G q k"]:
  """The scores of a tile from its dot products, float32; the bias is the tile's own part of the
  bias.
  """
  K = product.shape[1]
  scores = product.astype(jnp.float32) * scale
  if logit_cap is not None:
    scores = logit_cap * jnp.tanh(scores / logit_cap)
  if modifiers.bias is not None:
    scores = scores + grouped(modifiers.bias.astype(jnp.float32), K)
  if modifiers.alibi_slopes is not None:
    distance = jnp.abs(q_idx[:, None] - k_idx[None, :]).astype(jnp.float32)[None, None]
    slopes = modifiers.alibi_slopes.astype(jnp.float32)[None, :, None, None]
    scores = scores - grouped(slopes * distance, K)
  return scores
