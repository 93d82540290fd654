"""The alphabet: one letter, one meaning, in every signature, einsum string and unpacking of this
repository.

    B batch            T query length           S key/value length
    N query heads      K key/value heads        G = N // K  queries per key head
    H head width of q, k                        h head width of v and of the output
    D model width      F mlp width              V vocabulary            L layers
    C chunk length     W window length          M feature-map width

Arrays are `B T N H`; masks `B N T S` with any of them 1; recurrent state `B N M h`; log-sum-exp `B
N T` inside and `B T N` as a result, float32, natural logarithm. The letters are those of
`jax.nn.dot_product_attention`, extended.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

Query = Float[Array, "*B T N H"]
Key = Float[Array, "*B S K H"]
Value = Float[Array, "*B S K h"]
Output = Float[Array, "*B T N h"]
LogSumExp = Float[Array, "*B T N"]
MaskArray = Bool[Array, "#B #N #T #S"]
SegmentIds = Int[Array, "B T"]

# A function of arrays that mixes tokens: (q, k, v, **inputs) -> out.
AttentionFn = Callable[..., jax.Array]
# A decoding state: a NamedTuple of arrays whose meaning belongs to its mechanism.
State = Any


class Foreign:
  """Holds a function of the caller's. What it reads may change, so no compiled program of it is
  kept.
  """


class Cost(NamedTuple):
  """What one call of a mechanism costs: the numbers that reports plot beside what was measured."""

  flops: float
  """Floating-point operations of the forward pass; a multiply-add counts two."""
  bytes: float
  """Bytes that must move between memory and the chip at the least: inputs read once, outputs
  written once.
  """
  state_bytes: float
  """Bytes of decoding state after S tokens."""
