"""What a linear-attention kernel is given, on any chip: arrays and a few settings.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T         state [M h]
    z_t = exp(g_t) z_{t-1} + k_t               normalizer [M], only with `settings.normalize`
    o_t = scale q_t S_t    or    o_t = q_t S_t / w_t   with   w_t = q_t . z_t

`linear_hopper.py` and `linear_tpu.py` have the same five functions:

    unsupported(q, k, v, g, settings) -> str | None
    forward(q, k, v, g, state, settings) -> (out, weight, state)
    backward(q, k, v, g, state, normalized, d_out, d_state, settings) -> (dq, dk, dv, dg, d_state)
    step(q, k, v, g, state, settings) -> (out, state)
    parts(states, T, h) -> int, how many parts of time should walk side by side, as rows of a batch

| array    | shape                                | dtype             |
|----------|--------------------------------------|-------------------|
| q, k, v  | `B T Nq M`, `B T K M`, `B T Kv h`    | one of the chip's |
| g        | None, `N`, `B T N` or `B T N M`      | float32           |
| out      | `B T N h`                            | v's               |
| weight   | `B N T`, None unless normalized      | float32           |

Features are made and segments, lengths and directions are lowered by the caller. N is the larger of
Nq and Kv; each number of heads divides it, and head n reads head n // (N / Nq) of q, n // (N / K)
of k, n // (N / Kv) of v. Gradients have the shapes of what they are gradients of, and `dg` is
float32. A step is one token: the same arrays without T, `weight` kept inside, the state updated in
place.

g lies between `FORGET` and 0 and is exact anywhere there: what lies between a write and a read is a
sum of numbers of one sign, never a difference of two running sums, which would lose the digits of a
small decay that follows a large one. A document begins where every g of a token is `FORGET`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

FORGET = -128.0
"""A log decay whose exp is 0 in float32, so that nothing that came before is seen."""


class Settings(NamedTuple):
  """What is known before anything runs. Hashable."""

  scale: float
  """On unnormalized outputs."""
  normalize: bool


class State(NamedTuple):
  """What the past leaves behind, float32."""

  kv: Array
  """`B N M h`."""
  z: Array | None
  """`B N M`, or None unless normalized."""


class Normalized(NamedTuple):
  """What the derivative of a normalized output reads, float32 `B N T`: with o = x / w,
  dx = inverse do and dw = -inverse delta.
  """

  inverse: Array
  """1 / weight, and 0 where the weight is 0."""
  delta: Array
  """sum(d_out out)."""

  @classmethod
  def of(cls, out: Array, weight: Array, d_out: Array) -> "Normalized":
    """Of a forward pass's results and the gradient of its output."""
    something = weight != 0
    inverse = jnp.where(something, 1 / jnp.where(something, weight, 1.0), 0.0)
    product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    return cls(inverse, product.sum(-1).swapaxes(1, 2))
