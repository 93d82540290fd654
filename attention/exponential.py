"""e^x for x <= 0, for less than XLA's own costs on a CPU.

    e^x = 2^n e^f        n = round(x / ln 2)        |f| <= ln(2) / 2

Cody and Waite 1980. n is read off the bits of x / ln 2 + 1.5 * 2^23, which float32 rounds to an
integer, and shifted into an exponent; e^f is a polynomial of degree 6, within 2e-9 of it (minimax).
Softmax spends on it much of what it does not spend on matrix products; FlashAttention-4 (Zadouri et
al. 2026) does the same on GPUs whose matrix units have outrun their exponentials.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from attention import chips

_LEAST = -88.0  # e^x is below the least normal number
_ROUNDER = 1.5 * 2**23
_ROUNDER_BITS = int(np.float32(_ROUNDER).view(np.int32))
_LN2 = 0.693359375, math.log(2) - 0.693359375  # the first has so few bits: its multiples are exact
_POWERS = (1.0, 1.0, 0.49999994, 0.16666432, 0.041668002, 0.008374163, 0.0013843644)


def exp(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """e^x, within 1.3 units in the last place, for x up to 87; 0 where it is below the least normal
  number. Other dtypes than float32, and other chips, have `jnp.exp`.
  """
  by_hand = x.dtype == jnp.float32 and chips.current().platform == "cpu"
  return _exp(x) if by_hand else jnp.exp(x)


@jax.custom_jvp
def _exp(x):
  x = jnp.maximum(x, _LEAST)
  bits = lax.bitcast_convert_type(x * (1 / math.log(2)) + _ROUNDER, jnp.int32)
  whole = bits - _ROUNDER_BITS  # In floats it would be (a + c) - c, and some XLA make a of that.
  n = whole.astype(jnp.float32)
  f = x - n * _LN2[0] - n * _LN2[1]
  power = (whole + 127) << 23
  total = jnp.full_like(f, _POWERS[-1])
  for c in _POWERS[-2::-1]:
    total = total * f + c
  return total * lax.bitcast_convert_type(power, jnp.float32)


@_exp.defjvp
def _derivative(primals, tangents):
  y = _exp(*primals)
  return y, y * tangents[0]
