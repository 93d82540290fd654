"""What a softmax-attention kernel is given, on any chip: arrays, ints, and one pure function.

`flash_hopper.py` and `flash_tpu.py` have the same three functions:

    unsupported(q, k, v, extras, settings) -> str | None
    forward(q, k, v, extras, settings, by_query) -> (out, m, l)
    backward(q, k, v, d_out, base, delta, extras, settings, by_query, by_key)
        -> (dq, dk, dv, d_bias, d_slopes)

a `blocks(...)` that says in which blocks the visits of each pass are to be counted, and the
`PRIMITIVES` that a rule may be made of, by JAX's names. Of a row's scores in base 2 (`tiles`) m is
the greatest, -inf where it may attend to nothing, and l the sum of 2^(score2 - m). Whoever calls
them owns the derivative: `log_sum_exp`, `gradients_of_rows` and `d_sinks` are the rest of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tiles

Array = jax.Array

PRIMITIVES = frozenset(
  {
    "abs", "add", "and", "broadcast_in_dim", "clamp", "convert_element_type", "cos", "div", "eq",
    "exp", "exp2", "ge", "gt", "integer_pow", "le", "log", "log2", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "or", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sqrt", "square", "sub",
    "tanh", "xor",
  }
)  # fmt: skip
"""What the compilers of all chips know of a tile, element by element."""


class Visits(NamedTuple):
  """For each block of one axis, the blocks of the other that it visits: the full ones first, which
  need no mask, then the mixed. b is 1 or B, n is 1 or N. NumPy's where they are known already.
  """

  order: Array | np.ndarray
  """int32 `b n blocks others`; entries from `active` on mean nothing."""
  full: Array | np.ndarray
  """int32 `b n blocks`: how many of them are full."""
  active: Array | np.ndarray
  """int32 `b n blocks`: how many are visited, full and mixed."""


class Blocks(NamedTuple):
  """(block_q, block_k) in which the visits of each pass are counted."""

  forward: tuple[int, int]
  """`by_query` of the forward pass."""
  d_query: tuple[int, int]
  """`by_query` of the backward pass."""
  d_key: tuple[int, int]
  """`by_key` of the backward pass."""


class Extras(NamedTuple):
  """The arrays that change scores or decide about pairs; None or () where absent."""

  bias: Array | None = None
  """`#B #N #T #S`, added to the scores."""
  alibi_slopes: Array | None = None
  """float32 `N`: the score falls by slope |t - s|."""
  sinks: Array | None = None
  """float32 `N`: a score of each head that has no value."""
  dropout_seeds: Array | None = None
  """int32 `B N`: see `tiles.keep`."""
  q_info: tuple[Array, ...] = ()
  """int32 `#B T` each: what the rule reads of a query."""
  k_info: tuple[Array, ...] = ()
  """int32 `#B S` each: what the rule reads of a key."""
  dense: tuple[Array, ...] = ()
  """bool `#B #N #T #S` each: masks that somebody holds as arrays."""


class Settings(NamedTuple):
  """What is known before anything runs. Hashable."""

  scale: float
  logit_cap: float | None
  dropout_rate: float
  rule: Callable[..., Array]
  """(q_idx, k_idx, q_info, k_info, dense) -> bool, elementwise on tiles of one shape `q k`; the
  last three are tuples of such tiles. Only mixed blocks are asked.
  """


_GREAT = 256.0
"""A score in base 2 beside which m + log2(l) is off by 1e-5 and more."""


def log_sum_exp(m: Array, l: Array) -> Array:
  """The natural one of each row, -inf where it may attend to nothing."""
  return m * tiles.LN_2 + jnp.log(l)


class Rows(NamedTuple):
  """What a backward pass is given of each row. With p = 2^(score2 - base) the gradients are
  p^T d_out, of the scores p (d_out . V - delta), and of a sink -p delta.
  """

  d_out: Array
  """`B T N h`, v's dtype."""
  base: Array
  """float32 `B N T`: m + log2(l), or +inf where nothing may be attended to."""
  delta: Array
  """float32 `B N T`: rowsum(d_out out) - d_lse."""


def gradients_of_rows(
  results: tuple[Array, Array, Array], d_out: Array, d_lse: Array, extras: Extras
) -> Rows:
  """Of (out, m, l) of a forward pass and the gradients of the output and the log-sum-exp.

  Beside a great m its sum with log2(l) loses the latter, all of it where a bias of -1e9 pads a row.
  Such a row's base is m alone, and d_out and d_lse are divided by l, which leaves all gradients as
  they are. Without a bias or slopes nothing is divided: a great score is a product of vectors then,
  whose own rounding is as large as what is lost.
  """
  out, m, l = results
  base = jnp.where(m == -jnp.inf, jnp.inf, m + jnp.log2(l))
  d_out = d_out.astype(jnp.float32)
  if extras.bias is not None or extras.alibi_slopes is not None:
    great = jnp.isfinite(m) & (jnp.abs(m) > _GREAT)
    base, share = jnp.where(great, m, base), jnp.where(great, 1.0 / l, 1.0)
    d_out, d_lse = d_out * share.swapaxes(1, 2)[..., None], d_lse * share
  d_out = d_out.astype(out.dtype)
  product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
  return Rows(d_out, base, product.sum(-1).swapaxes(1, 2) - d_lse)


def d_sinks(sinks: Array, rows: Rows) -> Array:
  """The gradient of the sinks, float32 `N`."""
  p = jnp.exp2(sinks[None, :, None] * tiles.LOG2_E - rows.base)
  return -(p * rows.delta).sum((0, 2))
