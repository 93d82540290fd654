"""What a softmax-attention kernel is given, on any chip: arrays, ints, and one pure function.

`flash_hopper.py` and `flash_tpu.py` have the same three functions:

    unsupported(q, k, v, extras, settings) -> str | None
    forward(q, k, v, extras, settings, by_query) -> (out, lse)
    backward(q, k, v, d_out, lse, delta, extras, settings, by_query, by_key)
        -> (dq, dk, dv, d_bias, d_slopes)

a `blocks(...)` that says in which blocks the visits of each pass are to be counted, and the
`PRIMITIVES` that a rule may be made of, by JAX's names. Whoever calls them owns the derivative:
`delta[t] = sum(d_out[t] out[t]) - d_lse[t]`, and the sinks' gradient follows from `lse` and `delta`
alone. A row that may attend to nothing gives 0 and log-sum-exp -inf; the backward pass is handed
+inf there, so that its probabilities are 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

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
