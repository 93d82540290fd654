"""A call of `linear_attention`: what it is given, checked before anything is computed."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int

from attention import feature_maps
from attention.chunk_scan import State
from attention.context_parallel import TimeAxis
from attention.feature_maps import FeatureMap
from attention.types import Key, Query, SegmentIds, Value

DEFAULT_CHUNK = 64


class Call(NamedTuple):
  """A checked call of `linear_attention`, as data."""

  q: Query
  k: Key
  v: Value
  log_decay: jax.Array | None
  feature_map: FeatureMap
  normalize: bool
  initial_state: State | None
  segment_ids: SegmentIds | None
  positions: Int[Array, "B T"] | None
  lengths: Int[Array, " B"] | None
  reverse: bool
  bidirectional: bool
  chunk_size: int
  scale: float
  time_axis: TimeAxis | None

  @property
  def num_heads(self) -> int:
    """N, of the output, the decay and the state."""
    return max(self.q.shape[2], self.v.shape[2])


def describe(
  q: Query,
  k: Key,
  v: Value,
  *,
  log_decay: Any = None,
  feature_map: FeatureMap | str | None = None,
  normalize: bool = False,
  initial_state: State | None = None,
  return_state: bool = False,
  segment_ids: Any = None,
  positions: Any = None,
  lengths: Any = None,
  reverse: bool = False,
  bidirectional: bool = False,
  axis_name: str | None = None,
  chunk_size: int | None = None,
  scale: float | None = None,
) -> Call:
  """Checks the arguments of `linear_attention` and returns the call as data. Computes nothing."""
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
    raise ValueError(
      f"q, k, v must be [B T N H], [B T K H], [B T K h], got {q.shape}, {k.shape}, {v.shape}"
    )
  B, T, _, H = q.shape
  if k.shape[:2] != (B, T) or k.shape[3] != H:
    raise ValueError(f"k must be [B={B} T={T} K H={H}] as q {q.shape} says, got {k.shape}")
  if v.shape[:2] != (B, T):
    raise ValueError(f"v must be [B={B} T={T} K h] as q {q.shape} says, got {v.shape}")
  N = _output_heads(q, k, v)
  check_real(q=q, k=k, v=v)
  feature_map = feature_maps.get(feature_map, H)
  feature_maps.check_length(feature_map, T, positions)
  feature_maps.check_normalized(feature_map, normalize)
  M = feature_map.num_features(H) if isinstance(feature_map, FeatureMap) else None
  _check_shape("log_decay", log_decay, (N,), (B, T, N), (B, T, N, M))
  if initial_state is not None:
    if not isinstance(initial_state, State):
      raise ValueError(
        f"initial_state must be a State(kv, z), got a {type(initial_state).__name__}"
      )
    _check_shape("initial_state.kv", initial_state.kv, (B, N, M, v.shape[3]))
    _check_shape("initial_state.z", initial_state.z, (B, N, M))
  _check_shape("segment_ids", segment_ids, (B, T))
  _check_shape("positions", positions, (B, T), (1, T))
  _check_shape("lengths", lengths, (B,))
  states = {"return_state": return_state, "initial_state": initial_state is not None}
  _check_direction(reverse, bidirectional, lengths is not None, states, axis_name)
  chunk_size = DEFAULT_CHUNK if chunk_size is None else chunk_size
  if chunk_size < 1 or chunk_size & (chunk_size - 1):
    raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")
  return Call(
    q, k, v, log_decay, feature_map, normalize, initial_state, segment_ids, positions, lengths,
    reverse, bidirectional, chunk_size, 1.0 if scale is None else scale,
    None if axis_name is None else TimeAxis(axis_name),
  )  # fmt: skip


def _check_direction(
  reverse: bool, bidirectional: bool, padded: bool, states: dict[str, bool], axis_name: str | None
) -> None:
  if bidirectional and (reverse or padded or any(states.values())):
    given = {"reverse": reverse, "lengths": padded} | states
    raise ValueError(
      "bidirectional=True reads both ways, so it excludes reverse, lengths and states, got "
      + ", ".join(f"{name}={value}" for name, value in given.items())
    )
  if reverse and padded:
    raise ValueError(
      "lengths pads the end, where reverse=True begins; flip the inputs instead, got both"
    )
  if axis_name is not None and padded:
    raise ValueError(
      f"lengths counts the tokens of one device, where axis_name={axis_name!r} cuts time over "
      "several; mark padding by segment_ids instead"
    )


def _output_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> int:
  """N, after a look at whether every number of heads divides it."""
  N = max(q.shape[2], v.shape[2])
  for name, x in (("q", q), ("k", k), ("v", v)):
    if N % x.shape[2]:
      raise ValueError(
        f"{name}'s heads must divide the output's, the more of q's {q.shape[2]} and v's "
        f"{v.shape[2]}: got {name} with {x.shape[2]} and N={N}"
      )
  return N


def check_step(
  state: State, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: Any, phi: FeatureMap
) -> None:
  """Raises ValueError where a token, `B heads width` each, does not fit the state before it."""
  B, N, M, h = state.kv.shape
  H = q.shape[-1]
  for name, x, width in (("q", q, H), ("k", k, H), ("v", v, h)):
    if x.ndim != 3 or x.shape[0] != B or x.shape[2] != width or N % max(1, x.shape[1]):
      raise ValueError(
        f"{name} of one token must be [B={B} heads {width}], the heads a divisor of {N}, for q "
        f"{q.shape} and a state {state.kv.shape}, got {x.shape}"
      )
  if phi.num_features(H) != M:
    raise ValueError(
      f"the state has {M} features, got q and k of width {H}, which makes {phi.num_features(H)}"
    )
  _check_shape("log_decay", log_decay, (N,), (B, N), (B, N, M))


def check_real(**arrays: jax.Array) -> None:
  """Raises ValueError where an array is of complex numbers."""
  for name, x in arrays.items():
    if jax.numpy.iscomplexobj(x):
      raise ValueError(f"{name} must be real, got {x.dtype}; a complex state is two real ones")


def _check_shape(name: str, array: Any, *shapes: tuple[int | None, ...]) -> None:
  if array is None:
    return
  got = getattr(array, "shape", None)
  if got not in shapes:
    wanted = " or ".join(map(str, shapes))
    got = f"a {type(array).__name__}" if got is None else got
    raise ValueError(f"{name} must be an array of shape {wanted}, got {got}")
