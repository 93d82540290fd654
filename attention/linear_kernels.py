"""Linear attention by a hand-written kernel: what all chips share.

A kernel knows k, v, decays and a state (`pallas_kernels.linear`), so everything else is lowered
here: features are made, a token that is padding neither writes nor fades, and a document begins
where a state fades to nothing. The derivative of a normalized output is put together here, and the
kernel's backward pass, which recomputes the states, does the rest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attention import chunk_scan, kernels
from attention.linear_call import Call
from pallas_kernels import linear
from pallas_kernels.linear import FORGET, Normalized, Settings


class Static(NamedTuple):
  """What is known before anything runs."""

  chip: str
  settings: Settings


class Operands(NamedTuple):
  """Every array of a call, as a kernel reads it."""

  q: Array
  k: Array
  v: Array
  g: Array | None
  state: linear.State


_kernel = functools.partial(kernels.module, "linear")


def unsupported(chip: str, call: Call) -> str | None:
  """Why a call of `linear_attention` cannot run here, forward and backward, or None."""
  if reason := kernels.unsupported(chip, (call.q, call.k, call.v)):
    return reason
  if not call.q.size:
    return f"there is no token, got q of {call.q.shape}"
  static, operands = lower(chip, call)
  return _kernel(chip).unsupported(*operands[:4], static.settings)


def parts(chip: str, call: Call) -> int:
  """Into how many parts of time the kernel wants a call cut, so that it fills the chip."""
  (B, T), N, h = call.q.shape[:2], call.num_heads, call.v.shape[3]
  return 1 if call.lengths is not None else _kernel(chip).parts(B * N, T, h)


def run(chip: str, call: Call) -> tuple[Array, chunk_scan.State]:
  """The output and the state of a call that runs from the first token to the last."""
  static, operands = lower(chip, call)
  out, _, state = _attend(static, operands)
  if call.lengths is not None:
    out = jnp.where(_real(call)[..., None, None], out, 0)
  z = call.initial_state.z if call.initial_state and state.z is None else state.z
  z = jnp.zeros(state.kv.shape[:3], state.kv.dtype) if z is None else z
  return out, chunk_scan.State(state.kv, z)


def _real(call: Call) -> Array:
  """Which tokens are not padding, `B T`."""
  B, T = call.q.shape[:2]
  return jnp.ones((B, T), bool) if call.lengths is None else chunk_scan.real_tokens(T, call.lengths)


def lower(chip: str, call: Call) -> tuple[Static, Operands]:
  """The call as its kernel reads it."""
  phi = call.feature_map
  q = phi(call.q.astype(jnp.float32), positions=call.positions, is_query=True)
  k = phi(call.k.astype(jnp.float32), positions=call.positions, is_query=False)
  v = call.v
  if call.lengths is not None:
    k, v = (jnp.where(_real(call)[..., None, None], x, 0) for x in (k, v))
  g = _decays(call)
  B, N, M = q.shape[0], call.num_heads, q.shape[3]
  kv, z = jnp.zeros((B, N, M, v.shape[3])), jnp.zeros((B, N, M))
  if call.initial_state is not None:
    kv, z = (x.astype(jnp.float32) for x in call.initial_state)
  state = linear.State(kv, z if call.normalize else None)
  operands = Operands(q.astype(call.q.dtype), k.astype(call.k.dtype), v, g, state)
  return Static(chip, Settings(call.scale, call.normalize)), operands


def _decays(call: Call) -> Array | None:
  """g of every token, 0 at padding and `FORGET` where a document begins; None if all is 0."""
  (B, T), g = call.q.shape[:2], call.log_decay
  if g is not None:
    g = jnp.maximum(g.astype(jnp.float32), FORGET)
  if call.segment_ids is None and (g is None or g.ndim == 1 and call.lengths is None):
    return g
  N = call.num_heads
  g = jnp.zeros((N,)) if g is None else g
  g = jnp.broadcast_to(g[None, None], (B, T, N)) if g.ndim == 1 else g
  real = _real(call).reshape(B, T, *(1,) * (g.ndim - 2))
  if call.segment_ids is not None:
    begins = chunk_scan.begins(call.segment_ids).reshape(real.shape)
    g = jnp.where(begins & real, FORGET, g)
  return jnp.where(real, g, 0.0)


def _forward(static: Static, operands: Operands) -> tuple[Array, Array | None, linear.State]:
  return _kernel(static.chip).forward(*operands, static.settings)


def _backward(static: Static, operands: Operands, results: Any, gradients: Any) -> Operands:
  out, weight, _ = results
  d_out, _, d_state = gradients
  normalized = None if weight is None else Normalized.of(out, weight, d_out)
  d_operands = Operands(
    *_kernel(static.chip).backward(*operands, normalized, d_out, d_state, static.settings)
  )
  return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), d_operands, operands)


class Token(NamedTuple):
  """A decoding step, its features made."""

  q: Array
  """`B Nq M`, as k `B K M` in the dtype of the state; v is `B Kv h` in its own."""
  k: Array
  v: Array
  g: Array | None
  """`N`, `B N` or `B N M`."""
  kv: Array
  z: Array
  scale: float
  normalize: bool


def step_unsupported(chip: str, token: Token) -> str | None:
  """Why a step cannot run here by a kernel, or None."""
  if reason := kernels.unsupported(chip, token[:3]):
    return reason
  static, x = _lowered_step(chip, token)
  return _kernel(chip).unsupported(*x[:4], static.settings)


def step(chip: str, token: Token) -> tuple[Array, Array, Array]:
  """(output, kv, z) after one token; without a derivative."""
  out, state = _step(*_lowered_step(chip, token))
  return out, state.kv, token.z if state.z is None else state.z


def _lowered_step(chip: str, token: Token) -> tuple[Static, Operands]:
  q, k, g = token.q.astype(token.v.dtype), token.k.astype(token.v.dtype), token.g
  if g is not None:
    g = jnp.maximum(g.astype(jnp.float32), FORGET)
    g = jnp.broadcast_to(g, token.kv.shape[:2]) if g.ndim == 1 else g
  state = linear.State(token.kv, token.z if token.normalize else None)
  settings = Settings(token.scale, token.normalize)
  return Static(chip, settings), Operands(q, k, token.v, g, state)


def _one_token(static: Static, operands: Operands) -> tuple[Array, linear.State]:
  return _kernel(static.chip).step(*operands, static.settings)


def _no_derivative(static: Static, operands: Any, results: Any, gradients: Any) -> Any:
  raise NotImplementedError(
    f"a step of the {static.chip!r} kernel has no derivative; implementation='xla' has"
  )


_step = kernels.differentiable_once(
  _one_token, _no_derivative, instead="implementation='xla' has derivatives"
)
_attend = kernels.differentiable_once(
  _forward, _backward, instead="implementation='chunked' has derivatives of every order"
)
