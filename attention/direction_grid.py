"""Hard-max attention of keys in space, approximately, with a state that does not grow.

Directions are the centers of the cells of a grid, n x n on each face of a cube. For every one the
best key so far is kept. A query reads the winner w of the cell that it looks through:

    q . (k_best - k_w)  <=  |q| e |k_best - k_w|,        e = sqrt(2) / n

for with u the unit vector of the cell's center, u . (k_best - k_w) <= 0, and |q / |q| - u| <= e: on
the cube the two are half a cell's diagonal apart, sqrt(2) / n, and projecting onto the ball inside
moves no two points apart. (An epsilon-kernel of the keys: Agarwal, Har-Peled and Varadarajan 2004,
https://doi.org/10.1145/1008731.1008736, has fewer directions, of which none is found in one step.)

6 n^2 scores per token and key head, as many numbers of state, one lookup per query: less than a
scan of all keys once these are more than 6 n^2.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention import loops, plane


class Grid(NamedTuple):
  """The best key so far of every direction."""

  score: Float[Array, "*K M"]
  index: Int[Array, "*K M"]


def error(cells: int) -> float:
  """e: of the score, no more is lost than this times |q| times the distance of two keys."""
  return math.sqrt(2) / cells


def directions(cells: int) -> Float[Array, "M 3"]:
  """The centers of all cells, on the cube: a longer vector has the same winner."""
  middle = (jnp.arange(cells, dtype=jnp.float32) + 0.5) * (2 / cells) - 1
  a, b = jnp.meshgrid(middle, middle, indexing="ij")
  face = jnp.stack([jnp.ones_like(a), a, b], -1).reshape(-1, 3)
  faces = [jnp.roll(sign * face, axis, axis=1) for axis in range(3) for sign in (1, -1)]
  return jnp.concatenate(faces)


def cell(q: Float[Array, "*T 3"], cells: int) -> Int[Array, "*T"]:
  """Which direction each query takes; that of 0 is any."""
  axis = jnp.abs(q).argmax(-1).astype(jnp.int32)
  at = lambda i: jnp.take_along_axis(q, ((axis + i) % 3)[..., None], -1)[..., 0]
  down = at(0) < 0
  depth = jnp.where(at(0) == 0, 1.0, at(0)).astype(q.dtype)
  place = lambda i: jnp.clip(
    jnp.floor((at(i) / depth + 1) * (cells / 2)).astype(jnp.int32), 0, cells - 1
  )
  face = 2 * axis + down.astype(jnp.int32)
  return (face * cells + place(1)) * cells + place(2)


def make_grid(shape: tuple[int, ...], cells: int, dtype: Any = jnp.float32) -> Grid:
  """Of no key, for heads in an array of `shape`."""
  shape = (*shape, 6 * cells**2)
  return Grid(jnp.full(shape, -jnp.inf, dtype), jnp.full(shape, -1, jnp.int32))


def add(grid: Grid, k: Float[Array, "*K 3"], index: Int[Array, ""], cells: int) -> Grid:
  """With one more key for each head; of equal ones the last stays."""
  axes = (None,) * (k.ndim - 1)
  u = tuple(directions(cells).astype(k.dtype)[axes + (slice(None), i)] for i in range(3))
  score = plane.score(u, tuple(k[..., i, None] for i in range(3)))
  better = score >= grid.score
  return Grid(jnp.where(better, score, grid.score), jnp.where(better, index, grid.index))


@functools.partial(jax.jit, static_argnames="cells")
def winners(
  q: Float[Array, "B T N 3"], k: Float[Array, "B T K 3"], *, cells: int
) -> Int[Array, "B T N"]:
  """Of each query the winner of its cell among the keys up to its own. No gradient."""
  q, k = lax.stop_gradient((q, k))
  (B, T, N, _), K = q.shape, k.shape[2]
  asked = cell(q, cells).reshape(B, T, K, N // K)

  def step(grid, token):
    k, asked, t = token
    grid = add(grid, k, t, cells)
    return grid, jnp.take_along_axis(grid.index, asked, -1)

  tokens = (k.swapaxes(0, 1), asked.swapaxes(0, 1), jnp.arange(T, dtype=jnp.int32))
  grid = make_grid((B, K), cells, k.dtype)
  grid = jax.tree.map(lambda x: x + loops.zero(k, x.dtype), grid)
  found = lax.scan(step, grid, tokens)[1]
  return found.swapaxes(0, 1).reshape(B, T, N)
