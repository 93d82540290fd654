"""Where a token stands: encodings of position that are applied to queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
  x: Float[Array, "B T N H"],
  positions: Int[Array, "#B T"],
  *,
  base: float = 10_000.0,
  fraction: float = 1.0,
) -> Float[Array, "B T N H"]:
  """Rotates pairs of channels by an angle that grows with the position, so that q . k depends on
  their distance only.

      (x_c, x_{c + R/2}) -> (x_c cos a - x_{c + R/2} sin a, x_{c + R/2} cos a + x_c sin a)
      a = position base^(-2c/R)

  Su et al. 2021, equation 34, https://arxiv.org/abs/2104.09864, with the halves of the rotated
  width R as the pairs (the layout of GPT-NeoX and Llama).

  Args:
    x: queries or keys.
    positions: the position of each token, counted from any origin.
    base: the slowest channel turns once in about 2 pi base tokens.
    fraction: the share of H that is rotated, R = fraction H, rounded down to an even number.

  Returns:
    The same shape and dtype; the rotation itself is done in float32.
  """
  rotated = int(x.shape[-1] * fraction + 1e-6) // 2 * 2
  frequency = base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / max(rotated, 1))
  angle = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., rotated:]], axis=-1)
