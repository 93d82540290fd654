"""What a mixer asks of an attention mechanism, and how it is run on one device.

The functions here see local arrays: all tokens of some heads, or all heads of some rows. What needs
neighboring tokens or their positions, convolutions and rotary, is therefore done here too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention.modules import convolution
from attention.positions import rotary


class Mechanism(Protocol):
  """What a mixer asks of an attention mechanism; `attention.variants.Layer` answers it.

  It must be hashable and compare by value, because it is part of a model's static structure.
  """

  @property
  def rotary(self) -> bool:
    """Whether queries and keys are turned by their positions first."""
    ...

  @property
  def mixer(self) -> Callable[..., Any]:
    """The module that makes what the mechanism learns from its input."""
    ...

  def attend(self, q: Any, k: Any, v: Any, *, segment_ids: Any = None, **inputs: Any) -> Any:
    """Causal attention over whole sequences."""
    ...

  def init_state(self, batch: int, **sizes: Any) -> Any:
    """The decoding state of no token."""
    ...

  def prefill(self, state: Any, q: Any, k: Any, v: Any, *, lengths: Any, **inputs: Any) -> Any:
    """Appends many tokens: (state, out)."""
    ...

  def step(self, state: Any, q: Any, k: Any, v: Any, **inputs: Any) -> Any:
    """Appends one token: (state, out)."""
    ...


class State(NamedTuple):
  """The decoding state of one layer."""

  mechanism: Any
  """Belongs to the mechanism: keys and values, a matrix, ..."""
  convolution: tuple[jax.Array, ...]
  """The last tokens that the convolutions of q, k and v have seen; empty without them."""


def attend(
  mechanism: Mechanism,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K h"],
  inputs: dict[str, jax.Array],
  weights: tuple[jax.Array, ...],
  segment_ids: Int[Array, "B T"] | None,
  positions: Int[Array, "B T"] | None,
) -> Float[Array, "B T N h"]:
  """Whole sequences of some heads, on one device."""
  if weights:
    q, k, v = (
      convolution.causal_convolution(x, weight, segment_ids=segment_ids)
      for x, weight in zip((q, k, v), weights, strict=True)
    )
  if mechanism.rotary:
    B, T = q.shape[:2]
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    q, k = rotary(q, positions), rotary(k, positions)
  return mechanism.attend(q, k, v, segment_ids=segment_ids, **inputs)


def _extend(mechanism, state, q, k, v, weights, positions, lengths):
  """The convolutions and positions of new tokens: (the convolutions' state, (q, k, v))."""
  qkv, kept = (q, k, v), ()
  if weights:
    pairs = [
      convolution.prefill(window, x, weight, lengths=lengths)
      for window, x, weight in zip(state.convolution, qkv, weights, strict=True)
    ]
    kept, qkv = zip(*pairs, strict=True)
  if mechanism.rotary:
    q, k, v = qkv
    qkv = rotary(q, positions), rotary(k, positions), v
  return kept, qkv


def prefill(
  mechanism: Mechanism,
  state: State,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K h"],
  inputs: dict[str, jax.Array],
  weights: tuple[jax.Array, ...],
  positions: Int[Array, "B T"],
  lengths: Int[Array, " B"] | None,
) -> tuple[State, Float[Array, "B T N h"]]:
  """Appends the first `lengths` tokens of each row."""
  kept, qkv = _extend(mechanism, state, q, k, v, weights, positions, lengths)
  inner, out = mechanism.prefill(state.mechanism, *qkv, lengths=lengths, **inputs)
  return State(inner, kept), out


def step(
  mechanism: Mechanism,
  state: State,
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K h"],
  inputs: dict[str, jax.Array],
  weights: tuple[jax.Array, ...],
  positions: Int[Array, " B"],
) -> tuple[State, Float[Array, "B N h"]]:
  """Appends one token to each row."""
  q, k, v = (x[:, None] for x in (q, k, v))
  kept, qkv = _extend(mechanism, state, q, k, v, weights, positions[:, None], None)
  inner, out = mechanism.step(state.mechanism, *(x[:, 0] for x in qkv), **inputs)
  return State(inner, kept), out
