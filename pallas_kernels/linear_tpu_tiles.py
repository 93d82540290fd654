"""What the linear-attention kernels of a TPU share: where a head's numbers lie, products, and a
chunk whose decays have been put into its queries and keys.

Arrays are `B T heads*width`: a head is whole columns of 128, so that a block of one head is a plain
block and time stays where it is. Width and time are padded with zeros, which write nothing, fade
nothing and are cut off.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear_tiles
from pallas_kernels.linear import State
from pallas_kernels.linear_tiles import LOG2_E, Array, wide

CHUNK = 128
"""Tokens of a chunk."""

LANES = 128

NUMBERS = 8
"""Rows of a chunk's numbers per token: a whole tile."""

HI, LO, AFTER, SCALE, D_WEIGHT = range(5)
"""Its rows: the running sum of the decays in two floats, what follows a token until the chunk ends,
and for the backward pass what a row of d_out is scaled by and the gradient of its weight."""


def flat(x: Array) -> Array:
  """`B T heads width` as whole chunks and whole lanes, `B T heads*width`."""
  x = wide(wide(x, 1, CHUNK), 3, LANES)
  return x.reshape(*x.shape[:2], -1)


def heads(x: Array, T: int, width: int, count: int) -> Array:
  """`flat` undone."""
  return x.reshape(*x.shape[:2], count, -1)[:, :T, :, :width]


def numbers(g: Array | None, B: int, T: int, N: int, scale, d_weight) -> Array:
  """What a kernel reads per token, `B N chunks NUMBERS CHUNK`; decays in base 2."""
  g = jnp.zeros((N,), jnp.float32) if g is None or g.ndim == 4 else g
  g = jnp.broadcast_to(g, (B, T, N)).swapaxes(1, 2) * LOG2_E
  cut = lambda x: wide(jnp.broadcast_to(x, (B, N, T)), 2, CHUNK).reshape(B, N, -1, CHUNK)
  g = cut(g)
  hi, lo = linear_tiles.running_sum(g)
  rows = [hi, lo, linear_tiles.following(g), cut(scale), cut(d_weight)]
  return jnp.stack([*rows, *[jnp.zeros_like(hi)] * (NUMBERS - len(rows))], 3)


class Shape(NamedTuple):
  """The sizes of a call, padded, and how its grid is cut."""

  B: int
  N: int
  chunks: int
  M: int
  h: int
  ratios: tuple[int, int, int]
  """Heads of the state that share one of q, of k, of v."""
  step: int
  """Heads that a step of the grid works on, so that one computes while another waits."""

  def grid(self) -> tuple[int, int, int]:
    """Batch row, heads, chunk in order."""
    return self.B, self.N // self.step, self.chunks

  def tokens(self, width: int, ratio: int = 1, *, reverse: bool = False) -> pl.BlockSpec:
    """A chunk of the heads of a step, each `width` wide, of an array `B T heads*width`."""
    per = max(1, self.step // ratio)
    at = lambda n: n if self.step >= ratio else n * self.step // ratio
    return pl.BlockSpec(
      (None, CHUNK, per * width), lambda b, n, c: (b, self._chunk(c, reverse), at(n))
    )

  def chunk(self, *sizes: int, reverse: bool = False) -> pl.BlockSpec:
    """What every chunk of a head has one of, `B N chunks ...`."""
    index = lambda b, n, c: (b, n, self._chunk(c, reverse), *(0 for _ in sizes))
    return pl.BlockSpec((None, self.step, None, *sizes), index)

  def head(self, *sizes: int) -> pl.BlockSpec:
    """What every head has one of, `B N ...`."""
    return pl.BlockSpec((None, self.step, *sizes), lambda b, n, c: (b, n, *(0 for _ in sizes)))

  def _chunk(self, c: Array, reverse: bool) -> Array:
    return self.chunks - 1 - c if reverse else c

  def scratch(self) -> list[Any]:
    """The state of a step's heads, transposed, and the normalizer."""
    vmem = lambda *sizes: pltpu.VMEM((self.step, *sizes), jnp.float32)
    return [vmem(self.h, self.M), vmem(1, self.M)]


def shape(q: Array, k: Array, v: Array, g: Array | None, most: int) -> Shape:
  """Of a call, with at most so many heads a step; half as many for each thing that makes one head
  more work, or the program would be long.
  """
  N = max(q.shape[2], v.shape[2])
  ratios = (N // q.shape[2], N // k.shape[2], N // v.shape[2])
  whole = lambda x: -(-x // LANES) * LANES
  fits = lambda n: N % n == 0 and all(n % r == 0 or r % n == 0 for r in ratios)
  per_channel, wide = g is not None and g.ndim == 4, max(q.shape[3], v.shape[3]) > LANES
  for more_work in (per_channel, wide, q.dtype == jnp.float32):
    most //= 2 if more_work else 1
  step = max(n for n in range(1, max(most, 1) + 1) if fits(n))
  chunks = -(-q.shape[1] // CHUNK)
  return Shape(q.shape[0], N, chunks, whole(q.shape[3]), whole(v.shape[3]), ratios, step)


def operands(
  shape: Shape,
  arrays: tuple[Array, ...],
  g: Array | None,
  scale: Array | float = 1.0,
  d_weight: Array | float = 0.0,
  *,
  reverse: bool = False,
) -> tuple[list[Array], list[pl.BlockSpec]]:
  """q, k, v, and with a gradient d_out, then numbers, then decays per channel where there are any;
  and their blocks.
  """
  widths, T = (shape.M, shape.M, shape.h, shape.h), arrays[0].shape[1]
  sizes = zip(arrays, widths, (*shape.ratios, 1), strict=False)
  found = [(flat(x), shape.tokens(width, r, reverse=reverse)) for x, width, r in sizes]
  rows = numbers(g, shape.B, T, shape.N, scale, d_weight)
  found.append((rows, shape.chunk(NUMBERS, CHUNK, reverse=reverse)))
  if g is not None and g.ndim == 4:
    found.append((flat(g.astype(jnp.float32)), shape.tokens(shape.M, reverse=reverse)))
  return [x for x, _ in found], [spec for _, spec in found]


def entering(state: State) -> tuple[Array, Array]:
  """A state as kernels keep it: (`B N h M`, `B N 1 M`), padded."""
  kv = wide(wide(state.kv.swapaxes(2, 3), 2, LANES), 3, LANES)
  z = jnp.zeros(state.kv.shape[:3], jnp.float32) if state.z is None else state.z
  return kv, wide(z[:, :, None], 3, LANES)


def leaving(kv: Array, z: Array, like: State) -> State:
  """`entering` undone."""
  M, h = like.kv.shape[2:]
  return State(kv[:, :, :h, :M].swapaxes(2, 3), None if like.z is None else z[:, :, 0, :M])


def columns(ref: Any, head: int, ratio: int, width: int) -> Array:
  """What head `head` of a step reads of a block."""
  at = head // ratio * width
  return ref[:, at : at + width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: Array, y: Array, contract: tuple[int, int], dtype: Any) -> Array:
  """The product of two matrices over one axis of each, both rounded to `dtype`, summed in float32.
  Gradients are float32.
  """
  precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (((contract[0],), (contract[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _product_forward(x, y, contract, dtype):
  return product(x, y, contract, dtype), (x, y)


def _product_backward(contract, dtype, operands, gradient):
  x, y = operands
  over_x, over_y = contract
  dx = ((gradient, y), (1, 1 - over_y)) if over_x == 1 else ((y, gradient), (1 - over_y, 1))
  dy = ((gradient, x), (0, 1 - over_x)) if over_y == 1 else ((x, gradient), (1 - over_x, 0))
  return tuple(product(*pair, over, dtype) for pair, over in (dx, dy))


product.defvjp(_product_forward, _product_backward)


class Faded(NamedTuple):
  """A chunk with its decays put in, float32."""

  q: Array
  """Queries as they read the state that enters, `C M`."""
  k: Array
  """Keys as they write the state that leaves, `C M`."""
  pairs: Array
  """Scores of the chunk's own reads and writes, `C C`, 0 above the diagonal."""
  fade: Array
  """Of the state, `1 M`."""


class Exponents(NamedTuple):
  """Decays per token, in base 2, as a chunk needs them."""

  between: Array
  """From a write (column) to a read (row), `C C`, -inf above the diagonal."""
  read: Array
  """`C LANES`, every lane alike."""
  write: Array
  """Likewise."""
  total: Array
  """`1 LANES`."""


def exponents(rows: Array) -> Exponents:
  """Of a chunk's numbers, `NUMBERS C`."""
  across = rows.T
  spread = lambda i: jnp.broadcast_to(across[:, i : i + 1], (CHUNK, LANES))
  read = spread(HI)
  between = (read - rows[HI : HI + 1]) + (spread(LO) - rows[LO : LO + 1])
  i, j = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
  between = jnp.where(i >= j, between, -jnp.inf)
  return Exponents(between, read, spread(AFTER), read[CHUNK - 1 :])


def along(x: Array, width: int) -> Array:
  """Lanes that are all alike, as many as `width`."""
  return jnp.concatenate([x] * (width // LANES), axis=1)


def faded(q: Array, k: Array, decays: Exponents, dtype: Any) -> Faded:
  """A chunk with decays per token; q and k in float32."""
  pairs = product(q, k, (1, 1), dtype) * jnp.exp2(decays.between)
  k, fade = written(k, decays)
  return Faded(q * along(jnp.exp2(decays.read), q.shape[1]), k, pairs, fade)


def written(k: Array, decays: Exponents) -> tuple[Array, Array]:
  """(keys as they write the state that leaves, its fading)."""
  write, total = (along(jnp.exp2(x), k.shape[1]) for x in (decays.write, decays.total))
  return k * write, total


def compiler_params() -> Any:
  """Rows and heads in any order, chunks in theirs."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
  )
