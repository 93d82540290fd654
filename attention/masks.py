"""Masks: who may attend to whom, as an algebra that answers for a block as well as for an element.

A mask is made from a few words and combined with `&`, `|` and `~`:

    causal()            sliding_window(2)     segments(0 0 1 1)     prefix(2) | causal()
    #...                #...                  ##..                  ##..
    ##..                ##..                  ##..                  ##..
    ###.                ###.                  ..##                  ###.
    ####                .###                  ..##                  ####

(rows are queries, columns keys, `#` may attend). It can be asked three ways, none of which needs
the others:

- for elements: `mask(q_idx, k_idx)`, inside a kernel or a tile;
- for blocks: `mask.block(...)`, empty, full or mixed, by interval arithmetic in O(blocks), so an
  implementation skips what is empty and leaves what is full unmasked without ever holding T x S
  booleans;
- as an array: `mask.as_array(T, S)`, for references and pictures.

The block answer is Kleene's three-valued logic: `any` is False only where no pair of the block is
allowed, `all` is True only where every pair is. Between them the block is mixed, which is always a
correct answer, only a slower one. An element is a block of one pair, so most masks are written
once, for intervals.

Numbers given to a maker are static: what they decide is known before anything runs. Arrays (segment
ids, lengths) may be traced and may differ by batch row.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention import parts
from attention.parts import Part
from attention.types import Foreign

# A number a maker was given, or something computed from one: NumPy when it is static, JAX when it
# is traced.
Array = np.ndarray | jax.Array


class Span(NamedTuple):
  """Intervals of positions, both ends included: interval i is first[i]..last[i], at most `width`
  long.
  """

  first: Array
  last: Array
  width: int

  @classmethod
  def blocks(cls, length: int, width: int) -> "Span":
    """Positions 0..length-1 cut into blocks of `width`; the last one may be shorter."""
    first = np.arange(0, length, width, dtype=np.int32)
    return cls(first, np.minimum(first + np.int32(width - 1), np.int32(length - 1)), width)

  def positions(self, size: int) -> jax.Array:
    """The positions of each interval, `intervals width`, within 0..size-1; a short interval repeats
    its last.
    """
    inside = jnp.asarray(self.first)[:, None] + jnp.arange(self.width, dtype=jnp.int32)[None]
    return jnp.clip(jnp.minimum(inside, jnp.asarray(self.last)[:, None]), 0, size - 1)


class Block(NamedTuple):
  """The answer for a grid of blocks, two bool arrays `#B #N q_blocks k_blocks`.

  `any`: some pair of the block may be allowed. `all`: every pair of the block is allowed.
  """

  any: Array
  all: Array


@dataclasses.dataclass(frozen=True)
class Mask:
  """Which query positions may attend to which key positions. Frozen; combine with `&`, `|`, `~`."""

  AXES: ClassVar[Mapping[str, str]] = {}
  """Of each array of the mask; behind # an axis may be 1."""

  def block(self, q: Span, k: Span) -> Block:
    """Empty, full or mixed, for every pair of a query interval and a key interval."""
    raise NotImplementedError

  def __call__(self, q_idx: Array, k_idx: Array) -> Array:
    """The allowed pairs of positions `q` and `k` (int vectors): bool `#B #N q k`."""
    return self.block(Span(q_idx, q_idx, 1), Span(k_idx, k_idx, 1)).all

  def __and__(self, other: "Mask") -> "Mask":
    return And(self, _checked(other))

  def __or__(self, other: "Mask") -> "Mask":
    return Or(self, _checked(other))

  def __invert__(self) -> "Mask":
    return Not(self)

  def check(self, B: int, N: int, T: int, S: int) -> None:
    """Raises ValueError where an array of the mask does not fit so many rows, heads, queries and
    keys.
    """
    sizes = {"B": B, "N": N, "T": T, "S": S}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, Mask):
        value.check(B, N, T, S)
      elif value is not None and (axes := self.AXES.get(field.name, "").split()):
        wanted = [sizes[axis[-1]] for axis in axes]
        fits = (
          size == want or (size == 1 and axis[0] == "#")
          for size, want, axis in zip(value.shape, wanted, axes, strict=True)
        )
        if not all(fits):
          raise ValueError(
            f"{field.name} of the mask must be [{', '.join(axes)}] = {wanted}, not "
            f"{list(value.shape)}"
          )

  @property
  def is_static(self) -> bool:
    """True where every answer is known before anything runs: no part of the mask is an array."""
    return not jax.tree.leaves(self)

  def part(self, rows: Part, heads: Part) -> "Mask":
    """The mask of these rows of the batch and these heads."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return type(self)(**{name: _part_of(value, rows, heads) for name, value in fields.items()})

  def shift(self, query: int | jax.Array) -> "Mask":
    """The same mask as a shard sees it whose query 0 is the query at position `query` of the
    whole.
    """
    return Shifted(self, jnp.asarray(query, jnp.int32))

  def as_array(self, T: int, S: int) -> jax.Array:
    """The mask as bool `#B #N T S`. O(T S) memory: for references and pictures."""
    return jnp.asarray(self(np.arange(T, dtype=np.int32), np.arange(S, dtype=np.int32)))

  def show(self, T: int = 16, S: int | None = None, *, batch: int = 0, head: int = 0) -> str:
    """A picture in text, one query a line: `#` may attend, `.` may not."""
    array = np.asarray(self.as_array(T, T if S is None else S))
    picture = array[batch if array.shape[0] > 1 else 0, head if array.shape[1] > 1 else 0]
    return "\n".join("".join("#" if allowed else "." for allowed in row) for row in picture)


def everything() -> Mask:
  """Every query may attend to every key."""
  return Band()


def causal(offset: int = 0) -> Mask:
  """The past and the present: `k <= q + offset`. With fewer queries than keys, `S - T` aligns their
  ends.
  """
  return Band(right=_integer("offset", offset))


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
  """The nearest keys: `q - left <= k <= q + right`, so `left + 1` of them when `right` is 0. None
  leaves a side open.

  The width counts as in `jax.nn.dot_product_attention(local_window_size=(left, right))`.
  Longformer, section 3.1, https://arxiv.org/abs/2004.05150.
  """
  return Band(left=_width("left", left), right=_width("right", right))


def segments(query_ids: jax.Array, key_ids: jax.Array | None = None) -> Mask:
  """Packed documents: a pair is allowed where the ids are equal. Ids are int `B T` and `B S`, one
  array when T = S.
  """
  for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
    if ids is not None and (ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer)):
      raise ValueError(f"{name} must be integers of shape [B, T], not {ids.dtype}{list(ids.shape)}")
  return Segments(query_ids, query_ids if key_ids is None else key_ids)


def prefix(length: int | jax.Array) -> Mask:
  """The first `length` keys, for every query; `length` may be int `B`. `prefix(p) | causal()` is a
  prefix LM.
  """
  if isinstance(length, int | np.integer):
    return Limits(key=operator.index(length))
  return lengths(key=length)


def lengths(query: jax.Array | None = None, key: jax.Array | None = None) -> Mask:
  """Padded rows: queries before `query[b]` and keys before `key[b]`, each int `B`."""
  for name, value in (("query", query), ("key", key)):
    if value is not None and (value.ndim != 1 or not jnp.issubdtype(value.dtype, jnp.integer)):
      raise ValueError(
        f"{name} lengths must be integers of shape [B], not {value.dtype}{list(value.shape)}"
      )
  return Lengths(query, key)


def chunked(size: int) -> Mask:
  """Chunks of `size` positions that attend within themselves: `q // size == k // size`."""
  return Chunked(_positive("size", size))


def strided(stride: int) -> Mask:
  """Every `stride`-th key counted from the query: `(q - k) % stride == 0`.

  Sparse Transformer, section 4.2, https://arxiv.org/abs/1904.10509.
  """
  return Strided(_positive("stride", stride))


def global_tokens(count: int) -> Mask:
  """The first `count` positions attend to all and are attended to by all. Longformer, section
  3.1.
  """
  return Limits(query=_integer("count", count)) | Limits(key=operator.index(count))


def from_array(array: jax.Array) -> Mask:
  """A bool array `#B #N T S` (leading axes may be absent): O(T S) memory, which is yours
  already.
  """
  if array.dtype != jnp.bool_ or not 2 <= array.ndim <= 4:
    raise ValueError(
      f"array must be bool of shape [B, N, T, S], not {array.dtype}{list(array.shape)}"
    )
  return FromArray(array.reshape((1,) * (4 - array.ndim) + array.shape))


def from_function(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Mask:
  """A function of broadcastable positions, `(q_idx, k_idx) -> bool`. No block of it is ever
  skipped: combine it with a mask that can answer for a block (`from_function(f) & causal()`) where
  there is one.
  """
  return FromFunction(function)


def positions(query: jax.Array, key: jax.Array, window: int | None = None) -> Mask:
  """Causal by position where tokens do not lie in order (a ring of keys, ragged rows): `0 <= p_k <=
  p_q`.

  Positions are int `B T` and `B S`; a negative key position is no token. `window` bounds `p_q - p_k
  < window`.
  """
  return Positions(query, key, None if window is None else _positive("window", window))


def _part_of(value: object, rows: Part, heads: Part) -> object:
  """Of an array `B ...`, or `B N T S`; of a mask its part."""
  if isinstance(value, Mask):
    return value.part(rows, heads)
  if isinstance(value, jax.Array) and value.ndim:
    layout = "B K" if value.ndim == 4 else "B"
    return parts.take(value, layout, {"B": rows, "K": heads})
  return value


def _checked(other: object) -> Mask:
  if not isinstance(other, Mask):
    raise TypeError(
      f"a mask combines with a mask, not with {type(other).__name__}; see from_array()"
    )
  return other


def _integer(name: str, value: int) -> int:
  if not isinstance(value, int | np.integer):
    raise TypeError(f"{name} must be a number that is known before anything runs, not {value!r}")
  return operator.index(value)


def _positive(name: str, value: int) -> int:
  if _integer(name, value) < 1:
    raise ValueError(f"{name} must be at least 1, not {value}")
  return operator.index(value)


def _width(name: str, value: int | None) -> int | None:
  if value is not None and _integer(name, value) < 0:
    raise ValueError(f"{name} must be at least 0 or None for an open side, not {value}")
  return None if value is None else operator.index(value)


def _column(x: Array) -> Array:
  """Per query: `q` or `B q` to `#B 1 q 1`."""
  return x[None, None, :, None] if x.ndim == 1 else x[:, None, :, None]


def _row(x: Array) -> Array:
  """Per key: `k` or `B k` to `#B 1 1 k`."""
  return x[None, None, None, :] if x.ndim == 1 else x[:, None, None, :]


def _every(conditions: list[Array], like: Array) -> Array:
  """The conjunction, or True in the shape of `like` where there is nothing to fulfil."""
  return functools.reduce(operator.and_, conditions, like == like)


def _equal(q_low: Array, q_high: Array, k_low: Array, k_high: Array) -> Block:
  """Where ids from two ranges may be equal, and where they must be."""
  some = (_column(q_low) <= _row(k_high)) & (_row(k_low) <= _column(q_high))
  every = (_column(q_low) == _row(k_high)) & (_column(q_high) == _row(k_low))
  return Block(some, every & (_column(q_low) == _column(q_high)))


def _static(**kwargs: Any) -> Any:
  """A field that is part of a mask's structure and not an array of it."""
  return dataclasses.field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Band(Mask):
  """A band of the distance: -left <= k - q <= right, a side open where None."""

  left: int | None = _static(default=None)
  right: int | None = _static(default=None)

  def block(self, q, k):
    nearest = _row(k.first) - _column(q.last)
    farthest = _row(k.last) - _column(q.first)
    some, every = [], []
    if self.left is not None:
      some, every = [farthest >= -self.left], [nearest >= -self.left]
    if self.right is not None:
      some, every = [*some, nearest <= self.right], [*every, farthest <= self.right]
    return Block(_every(some, nearest), _every(every, nearest))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strided(Mask):
  """A distance that `stride` divides."""

  stride: int = _static()

  def block(self, q, k):
    nearest = _row(k.first) - _column(q.last)
    farthest = _row(k.last) - _column(q.first)
    some = farthest // self.stride * self.stride >= nearest
    return Block(some, some & ((nearest == farthest) | (self.stride == 1)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunked(Mask):
  """The same chunk of `size` positions."""

  size: int = _static()

  def block(self, q, k):
    return _equal(*(end // self.size for end in (q.first, q.last, k.first, k.last)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments(Mask):
  """Equal ids. A block knows the least and the greatest id of its positions: unsorted ids stay
  correct.
  """

  AXES = {"query_ids": "#B T", "key_ids": "#B S"}

  query_ids: jax.Array
  key_ids: jax.Array

  def block(self, q, k):
    q_ids = self.query_ids[:, q.positions(self.query_ids.shape[1])]
    k_ids = self.key_ids[:, k.positions(self.key_ids.shape[1])]
    return _equal(q_ids.min(-1), q_ids.max(-1), k_ids.min(-1), k_ids.max(-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions(Mask):
  """Causal by the position that each token has, with a window."""

  AXES = {"query": "#B T", "key": "#B S"}

  query: jax.Array
  key: jax.Array
  window: int | None = _static(default=None)

  def block(self, q, k):
    q_pos = self.query[:, q.positions(self.query.shape[1])]
    k_pos = self.key[:, k.positions(self.key.shape[1])]
    some = (_row(k_pos.max(-1)) >= 0) & (_row(k_pos.min(-1)) <= _column(q_pos.max(-1)))
    every = (_row(k_pos.min(-1)) >= 0) & (_row(k_pos.max(-1)) <= _column(q_pos.min(-1)))
    if self.window is not None:
      some &= _column(q_pos.min(-1)) - _row(k_pos.max(-1)) < self.window
      every &= _column(q_pos.max(-1)) - _row(k_pos.min(-1)) < self.window
    return Block(some, every)


def _before(q: Span, k: Span, query: Array | int | None, key: Array | int | None) -> Block:
  """Queries before `query`, keys before `key`; None bounds nothing."""
  like = _column(q.first) + _row(k.first)
  some, every = [], []
  if query is not None:
    some, every = [_column(q.first) < query], [_column(q.last) < query]
  if key is not None:
    some, every = [*some, _row(k.first) < key], [*every, _row(k.last) < key]
  return Block(_every(some, like), _every(every, like))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits(Mask):
  """Queries and keys before a static number."""

  query: int | None = _static(default=None)
  key: int | None = _static(default=None)

  def block(self, q, k):
    return _before(q, k, self.query, self.key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lengths(Mask):
  """Queries and keys before a number of each batch row's own."""

  AXES = {"query": "#B", "key": "#B"}

  query: jax.Array | None
  key: jax.Array | None

  def block(self, q, k):
    rows = (None if x is None else x[:, None, None, None] for x in (self.query, self.key))
    return _before(q, k, *rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromArray(Mask):
  """An array that somebody holds, bool `#B #N #T #S`."""

  AXES = {"array": "#B #N #T #S"}

  array: jax.Array

  def __call__(self, q_idx, k_idx):
    rows = jnp.take(self.array, jnp.asarray(q_idx), axis=-2, mode="clip")
    return jnp.take(rows, jnp.asarray(k_idx), axis=-1, mode="clip")

  def block(self, q, k):
    T, S = self.array.shape[-2:]
    rows = self.array[..., q.positions(T), :]  # B N q_blocks width S
    blocks = [reduce(rows, axis=-2)[..., k.positions(S)] for reduce in (jnp.any, jnp.all)]
    return Block(blocks[0].any(-1), blocks[1].all(-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromFunction(Mask, Foreign):
  """A function of positions; its blocks are always mixed."""

  function: Callable[[jax.Array, jax.Array], jax.Array] = _static()

  def __call__(self, q_idx, k_idx):
    allowed = self.function(jnp.asarray(q_idx)[:, None], jnp.asarray(k_idx)[None, :])
    return jnp.broadcast_to(allowed, (q_idx.shape[0], k_idx.shape[0]))[None, None]

  def block(self, q, k):
    shape = (1, 1, q.first.shape[0], k.first.shape[0])
    return Block(np.ones(shape, bool), np.zeros(shape, bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(Mask):
  """Allowed by both."""

  left: Mask
  right: Mask

  def __call__(self, q_idx, k_idx):
    return self.left(q_idx, k_idx) & self.right(q_idx, k_idx)

  def block(self, q, k):
    left, right = self.left.block(q, k), self.right.block(q, k)
    return Block(left.any & right.any, left.all & right.all)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(Mask):
  """Allowed by either."""

  left: Mask
  right: Mask

  def __call__(self, q_idx, k_idx):
    return self.left(q_idx, k_idx) | self.right(q_idx, k_idx)

  def block(self, q, k):
    left, right = self.left.block(q, k), self.right.block(q, k)
    return Block(left.any | right.any, left.all | right.all)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Not(Mask):
  """Allowed where the other is not."""

  mask: Mask

  def __call__(self, q_idx, k_idx):
    return ~self.mask(q_idx, k_idx)

  def block(self, q, k):
    inside = self.mask.block(q, k)
    return Block(~inside.all, ~inside.any)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shifted(Mask):
  """A mask whose query 0 is the other's query `query`."""

  mask: Mask
  query: jax.Array

  def check(self, B, N, T, S):
    """Nothing: how many queries the whole has is not known here."""

  def __call__(self, q_idx, k_idx):
    return self.mask(q_idx + self.query, k_idx)

  def block(self, q, k):
    return self.mask.block(Span(q.first + self.query, q.last + self.query, q.width), k)
