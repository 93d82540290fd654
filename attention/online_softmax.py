"""The softmax of a row that is seen in parts: a running maximum, sum and output, and the merge of
two partial results.

    m' = max(m, max(s))
    l' = l e^(m - m') + sum(e^(s - m'))
    acc' = acc e^(m - m') + e^(s - m') v

Milakov and Gimelshein 2018, algorithm 3, https://arxiv.org/abs/1805.02867; with the output carried
along, Rabe and Staats 2021, https://arxiv.org/abs/2112.05682. A row that has seen nothing has m =
-inf, l = 0, acc = 0, and ends as output 0 and log-sum-exp -inf: no case of it divides by zero or
subtracts infinities.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attention.exponential import exp


class Running(NamedTuple):
  """What is known of each row so far, float32. Leading axes are the caller's."""

  m: Float[Array, "*R T"]
  """The greatest score."""
  l: Float[Array, "*R T"]
  """The sum of e^(score - m)."""
  acc: Float[Array, "*R T h"]
  """The sum of e^(score - m) v."""


def start(rows: tuple[int, ...], width: int) -> Running:
  """Rows that have seen nothing: `rows` is the shape of m and l, `width` is h."""
  zero = jnp.zeros(rows, jnp.float32)
  return Running(zero - jnp.inf, zero, jnp.zeros((*rows, width), jnp.float32))


def _finite(m: Array) -> Array:
  """A maximum that can be subtracted: 0 where the row is empty, so that e^(-inf - m) is 0 and not
  NaN.
  """
  return jnp.where(m == -jnp.inf, 0.0, m)


def update(
  state: Running,
  scores: Float[Array, "*R T S"],
  v: Float[Array, "*R S h"],
  contract: str,
  keep: Bool[Array, "*R T S"] | None = None,
) -> Running:
  """Adds a tile of scores (-inf where masked) and its values; `contract` is the einsum of
  probabilities and values. What dropout does not keep has a probability and no value.
  """
  m = jnp.maximum(state.m, scores.max(-1))
  p = exp(scores - _finite(m)[..., None])
  decay = exp(state.m - _finite(m))
  used = p if keep is None else jnp.where(keep, p, 0.0)
  new = jnp.einsum(contract, used.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return Running(m, state.l * decay + p.sum(-1), state.acc * decay[..., None] + new)


def finish(state: Running) -> tuple[Float[Array, "*R T h"], Float[Array, "*R T"]]:
  """The output and the log-sum-exp of each row."""
  safe = jnp.where(state.l == 0.0, 1.0, state.l)
  return state.acc / safe[..., None], log_sum_exp(state.m, state.l)


def log_sum_exp(m: Float[Array, "*R T"], l: Float[Array, "*R T"]) -> Float[Array, "*R T"]:
  """m + log l, and -inf of an empty row.

  Beside a great m nothing is left of log l: who wants probabilities needs both.
  """
  empty = l == 0.0
  return jnp.where(empty, -jnp.inf, _finite(m) + jnp.log(jnp.where(empty, 1.0, l)))


def merge(
  first: tuple[Float[Array, "*R T h"], Float[Array, "*R T"]],
  second: tuple[Float[Array, "*R T h"], Float[Array, "*R T"]],
) -> tuple[Float[Array, "*R T h"], Float[Array, "*R T"]]:
  """Attention to two disjoint sets of keys from attention to each: (output, log-sum-exp) of the
  union.
  """
  (out_a, lse_a), (out_b, lse_b) = first, second
  lse = jnp.logaddexp(lse_a, lse_b)
  weight_a, weight_b = (jnp.exp(x - _finite(lse))[..., None] for x in (lse_a, lse_b))
  return out_a * weight_a + out_b * weight_b, lse
