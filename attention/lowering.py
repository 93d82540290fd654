"""What a kernel reads of a mask: which blocks to visit, and a rule for the pairs of mixed ones.

A kernel takes arrays, ints and one pure function (`pallas_kernels.flash`). A mask becomes

- visits: for each block of queries the blocks of keys with something in them, full ones first, and
  the same by key, from `Mask.block`: O(blocks) time and memory, never T x S;
- what the rule reads of each query and each key, int32 `#B T` and `#B S`: segment ids, positions,
  whether a length covers it;
- the rule itself, which decides elementwise on tiles of one shape, in any layout a chip likes.

Arrays that somebody holds as T x S booleans stay what they are and are read tile by tile.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from attention import masks
from attention.masks import Mask, Span
from pallas_kernels.flash import Visits

Array = jax.Array

_STATIC_BLOCKS = 2**16
"""Visits of more blocks than this are computed on the chip: as constants they would swell the
program.
"""


@dataclasses.dataclass(frozen=True)
class Rule:
  """(q_idx, k_idx, q_info, k_info, dense) -> bool, elementwise: what is static of a mask."""

  structure: Any
  """The mask's tree, without its arrays."""

  def __call__(
    self,
    q_idx: Array,
    k_idx: Array,
    q_info: tuple[Array, ...] = (),
    k_info: tuple[Array, ...] = (),
    dense: tuple[Array, ...] = (),
  ) -> Array:
    """Which pairs of a tile are allowed; all operands have the tile's shape."""
    mask = jax.tree.unflatten(self.structure, [0] * self.structure.num_leaves)
    reads = _Reads(iter(q_info), iter(k_info), iter(dense))
    return _decide(mask, q_idx, k_idx, reads)


class Lowered(NamedTuple):
  """A mask as a kernel takes it, all but the visits."""

  rule: Rule
  q_info: tuple[Array, ...]
  k_info: tuple[Array, ...]
  dense: tuple[Array, ...]


class _Reads(NamedTuple):
  """What `_operands` wrote, read in the same order."""

  q: Iterator[Array]
  k: Iterator[Array]
  dense: Iterator[Array]


def lower(mask: Mask, T: int, S: int) -> Lowered:
  """The rule of a mask, and what it reads, for T queries and S keys."""
  q_info, k_info, dense = [], [], []
  for kind, array in _operands(mask, jnp.arange(T, dtype=jnp.int32), S):
    {"q": q_info, "k": k_info, "dense": dense}[kind].append(array)
  return Lowered(Rule(jax.tree.structure(mask)), tuple(q_info), tuple(k_info), tuple(dense))


def unreadable(mask: Mask, primitives: frozenset[str]) -> str | None:
  """Why a kernel that has these `primitives` cannot compute a function of the caller's, or None."""
  tile = jax.ShapeDtypeStruct((8, 128), jnp.int32)
  for part in jax.tree.leaves(mask, is_leaf=lambda x: isinstance(x, masks.FromFunction)):
    if not isinstance(part, masks.FromFunction):
      continue
    try:
      jaxpr = jax.make_jaxpr(part.function)(tile, tile)
    except Exception as error:  # Anything: the function is the caller's.
      return f"its mask's function raises {type(error).__name__} on a tile of positions"
    if jaxpr.consts:
      array = jax.typeof(jaxpr.consts[0])
      return f"its mask's function holds an array of its own, {array.dtype}{list(array.shape)}"
    if missing := _primitives(jaxpr.jaxpr) - primitives:
      names = ", ".join(sorted(missing))
      return f"its mask's function computes {names}, which no tile of a kernel does"
  return None


def _primitives(jaxpr: Any) -> set[str]:
  """The names of all that is computed, of the functions inside, too."""
  found = set()
  for equation in jaxpr.eqns:
    inside = [x.jaxpr for x in equation.params.values() if isinstance(x, ClosedJaxpr)]
    found |= set().union(*map(_primitives, inside)) if inside else {equation.primitive.name}
  return found


def cut(mask: Mask, S: int, *blocks: int) -> Mask:
  """The mask without what lies behind the last of S keys, if blocks of keys so wide reach there."""
  return mask & masks.prefix(S) if any(S % block for block in blocks) else mask


def visits(mask: Mask, T: int, S: int, block_q: int, block_k: int) -> tuple[Visits, Visits]:
  """(by query, by key): who visits whom, in blocks of `block_q` queries and `block_k` keys. Of a
  static mask they are NumPy's, so that a kernel may know them before it runs. The last block of
  keys is asked about whole: of a mask that is `cut` it is not full if it reaches beyond S.
  """
  q, k = Span.blocks(T, block_q), Span.blocks(-(-S // block_k) * block_k, block_k)
  if q.first.size * k.first.size > _STATIC_BLOCKS:
    q, k = (Span(jnp.asarray(x.first), jnp.asarray(x.last), x.width) for x in (q, k))
  some, every = mask.block(q, k)
  return _visits(some, every), _visits(some.swapaxes(-1, -2), every.swapaxes(-1, -2))


def _visits(some: Any, every: Any) -> Visits:
  xp = np if isinstance(some, np.ndarray) else jnp
  state = xp.where(every, np.int8(0), xp.where(some, np.int8(1), np.int8(2)))
  order = xp.argsort(state, axis=-1, stable=True).astype(np.int32)
  full, active = ((state < bound).sum(-1, dtype=np.int32) for bound in (1, 2))
  return Visits(order, full, active)


# What each mask reads of a query, of a key, of a pair; and how it decides. One pair a class.


def _operands(
  mask: Mask, q_pos: Array, S: int, shifted: bool = False
) -> Iterator[tuple[str, Array]]:
  """("q" | "k" | "dense", array) in the order in which `_decide` asks for them. `q_pos`, int32 `T`,
  are the positions of the queries.
  """
  k_pos = jnp.arange(S, dtype=jnp.int32)
  match mask:
    case masks.And() | masks.Or():
      yield from _operands(mask.left, q_pos, S, shifted)
      yield from _operands(mask.right, q_pos, S, shifted)
    case masks.Not():
      yield from _operands(mask.mask, q_pos, S, shifted)
    case masks.Shifted():
      q_pos = q_pos + mask.query
      yield "q", q_pos[None]
      yield from _operands(mask.mask, q_pos, S, shifted=True)
    case masks.Segments():
      yield "q", _at(mask.query_ids, q_pos)
      yield "k", _at(mask.key_ids, k_pos)
    case masks.Positions():
      yield "q", _at(mask.query, q_pos)
      yield "k", _at(mask.key, k_pos)
    case masks.Lengths():
      if mask.query is not None:
        yield "q", (q_pos[None] < mask.query[:, None]).astype(jnp.int32)
      if mask.key is not None:
        yield "k", (k_pos[None] < mask.key[:, None]).astype(jnp.int32)
    case masks.FromArray():
      yield "dense", mask(q_pos, k_pos) if shifted else mask.array
    case _:
      pass


def _at(x: Array, positions: Array) -> Array:
  """`B T` at some positions, as int32; past the end it repeats its last."""
  return jnp.take(x, positions, axis=1, mode="clip").astype(jnp.int32)


def _decide(mask: Mask, q: Array, k: Array, reads: _Reads) -> Array:
  """The answer of a mask without arrays, for a tile of positions, and of what it reads of them."""
  match mask:
    case masks.And() | masks.Or():
      left, right = (_decide(part, q, k, reads) for part in (mask.left, mask.right))
      return left & right if isinstance(mask, masks.And) else left | right
    case masks.Not():
      return _decide(mask.mask, q, k, reads) ^ (q == q)  # Mosaic GPU knows no negation of bools
    case masks.Shifted():
      return _decide(mask.mask, next(reads.q), k, reads)
    case masks.Segments():
      return next(reads.q) == next(reads.k)
    case masks.Positions():
      return _later(mask, next(reads.q), next(reads.k))
    case masks.Lengths():
      return _covered(mask, q, reads)
    case masks.FromArray():
      allowed = next(reads.dense)
      return allowed if allowed.dtype == jnp.bool_ else allowed != 0
    case masks.FromFunction():
      return jnp.broadcast_to(mask.function(q, k), q.shape)
    case _:
      return _by_position(mask, q, k)


def _later(mask: masks.Positions, q: Array, k: Array) -> Array:
  allowed = (k >= 0) & (k <= q)
  return allowed if mask.window is None else allowed & (q - k < mask.window)


def _covered(mask: masks.Lengths, q: Array, reads: _Reads) -> Array:
  sides = [read for read, x in ((reads.q, mask.query), (reads.k, mask.key)) if x is not None]
  return _all([next(read) != 0 for read in sides], q)


def _by_position(mask: Mask, q: Array, k: Array) -> Array:
  """The masks that read nothing but positions."""
  match mask:
    case masks.Band():
      left = [] if mask.left is None else [k >= (q - mask.left if mask.left else q)]
      right = [] if mask.right is None else [k <= (q + mask.right if mask.right else q)]
      return _all([*left, *right], q)
    case masks.Strided():
      return jax.lax.rem(jnp.abs(q - k), jnp.int32(mask.stride)) == 0
    case masks.Chunked():
      size = jnp.int32(mask.size)  # by which `div` truncates; of a shifted mask q may be negative
      return (q >= 0) & (jax.lax.div(q, size) == jax.lax.div(k, size))
    case masks.Limits():
      left = [] if mask.query is None else [q < mask.query]
      right = [] if mask.key is None else [k < mask.key]
      return _all([*left, *right], q)
  raise NotImplementedError(f"no kernel reads a mask of type {type(mask).__name__}")


def _all(conditions: list[Array], like: Array) -> Array:
  return functools.reduce(jnp.logical_and, conditions) if conditions else like == like
