"""Softmax attention by a hand-written kernel: what all chips share.

The mask is lowered to visits and a rule (`attention.lowering`), the kernel runs forward, and its
derivative is put together here: what its backward pass is given of each row makes the log-sum-exp
differentiable, the sinks' gradient follows from that, and the kernel does the rest. Which kernel is
data: a module of `pallas_kernels` with the functions that `pallas_kernels.flash` describes. Kernels
are imported when one is first asked about: Pallas is large, and most programs need one chip's part.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attention import kernels, lowering
from attention.masks import Mask
from attention.scores import Modifiers
from pallas_kernels.flash import Extras, Settings, d_sinks, gradients_of_rows, log_sum_exp


class _Static(NamedTuple):
  """What is known before anything runs."""

  chip: str
  scale: float
  logit_cap: float | None
  dropout_rate: float


class _Operands(NamedTuple):
  """Every array of a call, in one place."""

  q: Array
  k: Array
  v: Array
  modifiers: Modifiers
  sinks: Array | None
  dropout_seeds: Array | None
  mask: Mask


_kernel = functools.partial(kernels.module, "flash")


def unsupported(chip: str, call: Any) -> str | None:
  """Why a call of `dot_product_attention` cannot run here, forward and backward, or None."""
  if reason := kernels.unsupported(chip, call[:3]):
    return reason
  if reason := lowering.unreadable(call.mask, _kernel(chip).PRIMITIVES):
    return reason
  static, operands = _split(chip, call)
  _, extras, settings = _given(static, operands)
  return _kernel(chip).unsupported(*operands[:3], extras, settings)


def attend(chip: str, call: Any) -> tuple[Array, Array]:
  """The output `B T N h` and the log-sum-exp `B N T`, float32."""
  return _attend(*_split(chip, call))[:2]


def _split(chip: str, call: Any) -> tuple[_Static, _Operands]:
  rate, seeds = (call.dropout.rate, call.dropout.seeds) if call.dropout else (0.0, None)
  arrays = _Operands(call.query, call.key, call.value, call.modifiers, call.sinks, seeds, call.mask)
  return _Static(chip, call.scale, call.logit_cap, rate), arrays


def _given(static: _Static, operands: _Operands) -> tuple[Mask, Extras, Settings]:
  """What the kernel is given beside q, k and v, and the mask behind it, cut at the last key."""
  T, S = (x.shape[1] for x in operands[:2])
  blocks = _blocks(static, operands)
  mask = lowering.cut(operands.mask, S, *(block_k for _, block_k in blocks))
  lowered = lowering.lower(mask, T, S)
  extras = Extras(
    bias=operands.modifiers.bias,
    alibi_slopes=_float32(operands.modifiers.alibi_slopes),
    sinks=_float32(operands.sinks),
    dropout_seeds=operands.dropout_seeds,
    q_info=lowered.q_info,
    k_info=lowered.k_info,
    dense=lowered.dense,
  )
  return mask, extras, _settings(static, lowered.rule)


def _float32(x: Array | None) -> Array | None:
  return None if x is None else x.astype(jnp.float32)


def _settings(static: _Static, rule: lowering.Rule) -> Settings:
  return Settings(static.scale, static.logit_cap, static.dropout_rate, rule)


def _blocks(static: _Static, operands: _Operands) -> Any:
  q, k, v = operands[:3]
  settings = _settings(static, lowering.Rule(jax.tree.structure(operands.mask)))
  return _kernel(static.chip).blocks(q.shape, k.shape, v.shape, q.dtype, settings)


def _visits(mask: Mask, operands: _Operands, blocks: tuple[int, int]) -> Any:
  return lowering.visits(mask, operands.q.shape[1], operands.k.shape[1], *blocks)


def _forward(static: _Static, operands: _Operands) -> tuple[Array, Array, Array, Array]:
  mask, extras, settings = _given(static, operands)
  by_query, _ = _visits(mask, operands, _blocks(static, operands).forward)
  out, m, l = _kernel(static.chip).forward(*operands[:3], extras, settings, by_query)
  return out, log_sum_exp(m, l), m, l


def _backward(static: _Static, operands: _Operands, results: Any, gradients: Any) -> Any:
  (out, _, m, l), (d_out, d_lse, _, _) = results, gradients
  mask, extras, settings = _given(static, operands)
  rows = gradients_of_rows((out, m, l), d_out, d_lse, extras)
  blocks = _blocks(static, operands)
  by_query, by_key = (_visits(mask, operands, block) for block in (blocks.d_query, blocks.d_key))
  dq, dk, dv, d_bias, d_slopes = _kernel(static.chip).backward(
    *operands[:3], *rows, extras, settings, by_query[0], by_key[1]
  )
  given: Any = operands
  given = given._replace(dropout_seeds=None, mask=None)
  found = given._replace(
    q=dq, k=dk, v=dv, modifiers=Modifiers(d_bias, d_slopes),
    sinks=None if extras.sinks is None else d_sinks(extras.sinks, rows),
  )  # fmt: skip
  return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), found, given)


_attend = kernels.differentiable_once(
  _forward,
  _backward,
  instead="implementation='xla' has derivatives of every order in O(T S) memory",
)
