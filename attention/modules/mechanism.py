"""What a mixer asks of an attention mechanism, and how it is run on one device.

The functions here see local arrays: all tokens of some heads, or all heads of some rows. What needs
neighboring tokens or their positions, convolutions and rotary, is therefore done here too.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention.modules import convolution
from attention.positions import rotary

NOTHING: Final[Mapping[str, jax.Array]] = types.MappingProxyType({})


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


class Around(Protocol):
  """What a mixer does around its mechanism, to some heads of convolved and turned tokens.

  It sees whole sequences `[B T N H]` and single tokens `[B N H]` alike, so it works on the last two
  axes. `run(q, k, v, **inputs)` is the mechanism; `inputs` are the mixer's, and its constants.
  """

  def __call__(
    self, run: Callable[..., jax.Array], q: Any, k: Any, v: Any, **inputs: Any
  ) -> jax.Array:
    """The output of the heads."""
    ...


def plain(run: Callable[..., jax.Array], q: Any, k: Any, v: Any, **inputs: Any) -> jax.Array:
  """Nothing around: the mechanism alone."""
  return run(q, k, v, **inputs)


class State(NamedTuple):
  """The decoding state of one layer."""

  mechanism: Any
  """Belongs to the mechanism: keys and values, a matrix, ..."""
  convolution: tuple[jax.Array | None, ...]
  """The last tokens that the convolutions of q, k and v have seen; empty without any."""


def attend(
  mechanism: Mechanism,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K h"],
  inputs: dict[str, jax.Array],
  weights: tuple[jax.Array | None, ...],
  segment_ids: Int[Array, "B T"] | None,
  positions: Int[Array, "B T"] | None,
  constants: Mapping[str, jax.Array] = NOTHING,
  around: Around = plain,
) -> Float[Array, "B T N h"]:
  """Whole sequences of some heads, on one device."""
  if weights:
    q, k, v = (
      x if weight is None else convolution.causal_convolution(x, weight, segment_ids=segment_ids)
      for x, weight in zip((q, k, v), weights, strict=True)
    )
  if mechanism.rotary:
    B, T = q.shape[:2]
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    q, k = rotary(q, positions), rotary(k, positions)
  run = functools.partial(mechanism.attend, segment_ids=segment_ids)
  return around(run, q, k, v, **inputs, **constants)


def _extend(mechanism, state, q, k, v, weights, positions, lengths):
  """The convolutions and positions of new tokens: (the convolutions' state, (q, k, v))."""
  qkv, kept = (q, k, v), ()
  if weights:
    pairs = [
      (window, x) if weight is None else convolution.prefill(window, x, weight, lengths=lengths)
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
  weights: tuple[jax.Array | None, ...],
  positions: Int[Array, "B T"],
  lengths: Int[Array, " B"] | None,
  constants: Mapping[str, jax.Array] = NOTHING,
  around: Around = plain,
) -> tuple[State, Float[Array, "B T N h"]]:
  """Appends the first `lengths` tokens of each row."""
  kept, qkv = _extend(mechanism, state, q, k, v, weights, positions, lengths)
  run = functools.partial(mechanism.prefill, state.mechanism, lengths=lengths)
  inner, out = _with_state(around, run, qkv, {**inputs, **constants})
  return State(inner, kept), out


def step(
  mechanism: Mechanism,
  state: State,
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K h"],
  inputs: dict[str, jax.Array],
  weights: tuple[jax.Array | None, ...],
  positions: Int[Array, " B"],
  constants: Mapping[str, jax.Array] = NOTHING,
  around: Around = plain,
) -> tuple[State, Float[Array, "B N h"]]:
  """Appends one token to each row."""
  q, k, v = jax.tree.map(lambda x: x[:, None], (q, k, v))
  kept, qkv = _extend(mechanism, state, q, k, v, weights, positions[:, None], None)
  qkv = jax.tree.map(lambda x: x[:, 0], qkv)
  run = functools.partial(mechanism.step, state.mechanism)
  inner, out = _with_state(around, run, qkv, {**inputs, **constants})
  return State(inner, kept), out


def _with_state(around, run, qkv, inputs):
  """`around` sees outputs alone; the state that the mechanism gives back passes it by."""
  new = []

  def output(*qkv, **inputs):
    state, out = run(*qkv, **inputs)
    new.append(state)
    return out

  out = around(output, *qkv, **inputs)
  return new[0], out
