"""The shape of a decoder, as one frozen record."""

import dataclasses
from typing import Final, Literal

import jax.numpy as jnp

Remat = Literal["none", "dots", "full"]
REMAT: Final[tuple[str, ...]] = ("none", "dots", "full")
DTYPES: Final[tuple[str, ...]] = ("float32", "bfloat16")


def check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises ValueError unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(f"{argument}={value!r} is not one of {', '.join(choices)}.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
  """A decoder-only language model: L blocks of a mixer and a gated MLP."""

  vocab_size: int
  num_layers: int = 4
  width: int = 256
  """D, the width of the residual stream."""
  num_heads: int = 4
  num_kv_heads: int | None = None
  """K, which divides num_heads; None means num_heads, 1 is multi-query attention."""
  head_dim: int | None = None
  """H, for queries, keys and values; None means width / num_heads."""
  mlp_width: int | None = None
  """F; None means 8/3 of the width, rounded up to a multiple of 32."""
  pattern: str = "softmax"
  """The mechanisms of the layers, repeated over the depth: "linear,linear,softmax:window=128"."""
  short_convolution: int = 0
  """Taps of a causal convolution over queries, keys and values before they mix; 0 means none."""
  dropout: float = 0.0
  tie_embeddings: bool = True
  dtype: str = "float32"
  """Of the computation, float32 or bfloat16. Parameters, statistics and logits are float32."""
  remat: str = "none"
  """What the backward pass computes again: nothing, all but products with weights, whole blocks."""

  def __post_init__(self):
    for name in ("vocab_size", "num_layers", "width", "num_heads"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
    for name in ("num_kv_heads", "head_dim", "mlp_width"):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or None.")
    if self.head_dim is None and self.width % self.num_heads:
      raise ValueError(
        f"width={self.width} is not divisible by num_heads={self.num_heads}, and head_dim is None."
      )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}."
      )
    if self.short_convolution < 0:
      raise ValueError(f"short_convolution={self.short_convolution} must be 0 (none) or more.")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1.")
    check_choice("dtype", self.dtype, DTYPES)
    check_choice("remat", self.remat, REMAT)

  @property
  def kv_heads(self) -> int:
    """K, the number of key/value heads."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def head_width(self) -> int:
    """H, the width of one head."""
    return self.width // self.num_heads if self.head_dim is None else self.head_dim

  @property
  def hidden_width(self) -> int:
    """F, the width inside the MLP."""
    return -(-self.width * 8 // (3 * 32)) * 32 if self.mlp_width is None else self.mlp_width

  @property
  def compute_dtype(self) -> jnp.dtype:
    """The dtype of activations."""
    return jnp.dtype(self.dtype)
