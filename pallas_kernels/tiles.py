"""The maths of one tile of softmax attention, for every chip: pure, elementwise, tested on the CPU.

Scores live in base 2, because chips have exp2 and no exp: with x = q . k,

    score = cap tanh(scale x / cap) + bias - slope |q_idx - k_idx|        score2 = score log2(e)
    p = 2^(score2 - base)        dP = keep (dO . v) / (1 - rate)          dS = p (dP - delta)
    dX = scale (1 - tanh^2) dS   dBias = dS                  dSlope = -|q_idx - k_idx| dS

Every operand of a function is a tile of one shape `q k` (a kernel broadcasts rows and columns into
the layout that its chip wants), or a scalar.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def scores(
  product: Array,
  *,
  scale: float,
  logit_cap: float | None = None,
  bias: Array | None = None,
  slope: Array | None = None,
  distance: Array | None = None,
) -> tuple[Array, Array | None]:
  """(score2, tanh) of the dot products, float32, unmasked; tanh is None without a cap.

  Without modifiers this is one multiplication by a constant, which a compiler folds into the
  subtraction before exp2.
  """
  tanh = None
  if logit_cap is None:
    score = product * (scale * LOG2_E)
  else:
    tanh = jnp.tanh(product * (scale / logit_cap))
    score = tanh * (logit_cap * LOG2_E)
  if bias is not None:
    score = score + bias.astype(jnp.float32) * LOG2_E
  if slope is not None and distance is not None:
    score = score - (slope * LOG2_E) * distance
  return score, tanh


def distance(q_idx: Array, k_idx: Array) -> Array:
  """|q_idx - k_idx| as float32."""
  return jnp.abs(q_idx - k_idx).astype(jnp.float32)


def finite(m: Array) -> Array:
  """A maximum that can be subtracted: 0 where the row has seen nothing."""
  return jnp.where(m == -jnp.inf, 0.0, m)


def d_scores(p: Array, dp: Array, delta: Array) -> Array:
  """The gradient of the scores: of the bias as it stands, of ALiBi's slope times -distance."""
  return p * (dp - delta)


def d_product(ds: Array, tanh: Array | None, *, scale: float) -> Array:
  """The gradient of the dot products from that of the scores."""
  return ds * scale if tanh is None else ds * ((1.0 - tanh * tanh) * scale)


def keep(seed: Array, q_idx: Array, k_idx: Array, *, rate: float) -> Array:
  """Which probabilities dropout keeps: a function of (seed, query, key) and of nothing else, so the
  bits are the same in every implementation, tiling, sharding and pass. `seed` is that of a batch
  row and head.
  """
  bits = random_bits(seed, q_idx, k_idx)
  return lax.shift_right_logical(bits, jnp.int32(8)) >= jnp.int32(round(rate * 2**24))


def random_bits(seed: Array, q_idx: Array, k_idx: Array) -> Array:
  """32 of them for every query and key, int32.

  Two rounds of a 32-bit mixer (Wellons 2018, `lowbias32`,
  https://nullprogram.com/blog/2018/07/31/), the query in the first and the key in the second, int32
  that wraps.
  """
  rows = _mixed(seed + q_idx * jnp.int32(_signed(0x9E3779B9)))
  return _mixed(rows ^ (k_idx * jnp.int32(_signed(0x85EBCA6B))))


def _mixed(x: Array) -> Array:
  """Every bit of the result depends on every bit of x."""
  shifted = lambda x, n: lax.shift_right_logical(x, jnp.int32(n))
  x = (x ^ shifted(x, 16)) * jnp.int32(_signed(0x7FEB352D))
  x = (x ^ shifted(x, 15)) * jnp.int32(_signed(0x846CA68B))
  return x ^ shifted(x, 16)


def _signed(bits: int) -> int:
  """The int32 with these 32 bits."""
  return bits - 2**32 if bits >= 2**31 else bits
