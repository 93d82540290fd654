"""A short causal convolution over tokens, one filter per channel."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attention import chunk_scan
from attention.modules import sharding


def causal_convolution(
  x: Float[Array, "B T N H"],
  weight: Float[Array, "N W H"],
  *,
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
  """Each channel's sum over its last W tokens, those of the same segment only.

      out[t] = sum over i < W of weight[i] x[t - i]       where t - i and t are of one segment

  A new segment begins wherever the id differs from the token before. Poli et al. 2023, section 3,
  https://arxiv.org/abs/2302.10866. O(T W) time.
  """
  T = x.shape[1]
  segments = None if segment_ids is None else chunk_scan.number_runs(segment_ids)
  out = jnp.zeros_like(x)
  for i in range(min(weight.shape[1], T)):
    term = x[:, : T - i] * weight[None, None, :, i]
    if segments is not None and i:
      same = segments[:, : T - i] == segments[:, i:]
      term = jnp.where(same[:, :, None, None], term, jnp.zeros_like(term))
    out = out + jnp.pad(term, ((0, 0), (i, 0), (0, 0), (0, 0)))
  return out


def prefill(
  state: Float[Array, "B R N H"],
  x: Float[Array, "B T N H"],
  weight: Float[Array, "N W H"],
  *,
  lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B R N H"], Float[Array, "B T N H"]]:
  """`causal_convolution` of tokens that follow those in `state`, the last R = W - 1 of each row.

  Rows end after `lengths` tokens; what the output holds beyond them means nothing.
  """
  B, T, R = x.shape[0], x.shape[1], state.shape[1]
  joined = jnp.concatenate([state, x], axis=1)
  ends = jnp.full((B,), T, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
  window = jax.vmap(lambda row, end: jax.lax.dynamic_slice_in_dim(row, end, R, axis=0))
  return window(joined, ends), causal_convolution(joined, weight)[:, R:]


class ShortConvolution(nnx.Module):
  """The filters of `causal_convolution` for N heads; they begin as the identity."""

  def __init__(self, size: int, num_heads: int, head_dim: int):
    shape, where = (num_heads, size, head_dim), sharding.spec("model_heads", None, None)
    zeros = jnp.zeros(shape, jnp.float32, out_sharding=where)
    self.weight = nnx.Param(zeros.at[:, 0].set(1.0))

  def init_state(self, batch: int, dtype: jnp.dtype) -> Float[Array, "B R N H"]:
    """Nothing seen yet: R = W - 1 tokens of zeros per row."""
    num_heads, size, head_dim = self.weight.shape
    return jnp.zeros((batch, size - 1, num_heads, head_dim), dtype)
