"""Programs of single numbers, which XLA's CPU compiler makes into native functions.

A loop whose turn touches less than 1 KiB becomes one function, with the loops inside of it, where
an array operation costs a microsecond to start: a walk down a tree takes nanoseconds a step. Two
rules keep it so, however large the arrays are (`tests/attention/test_hull.py` counts the loops):

- What a loop decides to write it carries into its next turn, which writes it before it reads. XLA
  takes the size of an array for bytes that are touched if the write also computes, in float32, and
  so loses what it subtracts again.
- Nothing is read and written in one turn in the other order, or XLA copies the array.

On other chips every turn is a launch: nothing here is for them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention import shapes


def get(x: Array, i: Array) -> Array:
  """x[i], i >= 0."""
  return row(x, i, 1)[0]


def put(x: Array, i: Array, value: Array) -> Array:
  """x with x[i] = value, i >= 0."""
  return put_row(x, i, value[None])


def row(x: Array, i: Array, width: int) -> Array:
  """x[i : i + width], i >= 0."""
  return lax.dynamic_slice(x, (i,), (width,), allow_negative_indices=False)


def put_row(x: Array, i: Array, values: Array) -> Array:
  """x with these values from i >= 0 on."""
  return lax.dynamic_update_slice(x, values, (i,), allow_negative_indices=False)


def bits(x: Array) -> Array:
  """The bits of a float32, as int32."""
  return lax.bitcast_convert_type(x, jnp.int32)


def floats(x: Array) -> Array:
  """The float32 of these bits."""
  return lax.bitcast_convert_type(x, jnp.float32)


def pack(*flags: Array) -> Array:
  """Booleans as the bits of an int32. XLA computes each result of a turn with all that it needs,
  again and again; what a number carries into the next turn it computes once, for all of them.
  """
  return sum((flag.astype(jnp.int32) << n for n, flag in enumerate(flags)), jnp.int32(0))


def unpack(packed: Array, count: int) -> list[Array]:
  """The first `count` booleans of `pack`."""
  return [((packed >> n) & 1) != 0 for n in range(count)]


class Rows(NamedTuple):
  """An array, but for one row that is still to be written."""

  array: Array
  at: Array
  row: Array

  def written(self) -> Array:
    """The array."""
    return put_row(self.array, self.at, self.row)


def unwritten(array: Array, width: int, after: Array | int = 0) -> Rows:
  """Nothing yet to write: the number `after`, in the last row, which must be nobody's. What that
  number comes of has read the array before, so XLA need not copy it.
  """
  last = jnp.full(width, after, array.dtype)
  return Rows(array, jnp.int32(array.shape[0] - width), last)


def times(count: int, turn: Callable[[Array, Any], Any], start: Any) -> Any:
  """`lax.fori_loop` from 0 on whose turns are numbered in int32, with `jax_enable_x64` too."""
  return lax.fori_loop(0, count, lambda i, carry: turn(i.astype(jnp.int32), carry), start)


def add(to: Rows, at: Array, new: Array, start: Array, width: Array, fresh: Array | bool) -> Rows:
  """`width` numbers of `new` from `start` on are added at `at`, or with `fresh` put there. Rows of
  one number.
  """

  def one(i, rows):
    array = rows.written()
    old = jnp.where(fresh, 0.0, row(array, at + i, 1))
    return Rows(array, at + i, old + row(new, start + i, 1))

  return lax.fori_loop(0, width, one, to)


def entered(
  entries: Float[Array, " C+1*X*w"],
  token: Array,
  new: Float[Array, "X w"],
  merged: Int[Array, "X m"] | None,
) -> Float[Array, " C+1*X*w"]:
  """The entries of C tokens and X heads, flat, with what a new token brings.

  Args: token: which it is; from C on it is nobody's. merged: for each head earlier tokens whose
    entries it is added to, each once; -1 for none.
  """
  heads, w = new.shape
  capacity = entries.shape[0] // (heads * w) - 1
  new = new.reshape(-1)
  entries = put_row(entries, jnp.minimum(token, capacity) * heads * w, new)
  if merged is None:
    return entries
  each, merged = merged.shape[1], merged.reshape(-1)

  def one(head, rows):
    last = jnp.int32(-1)
    for i in range(each):
      entry = get(merged, each * head + i)
      width = jnp.where((entry >= 0) & (entry != last), w, 0)
      rows = add(rows, (entry * heads + head) * w, new, head * w, width, False)
      last = entry
    return rows

  return times(heads, one, unwritten(entries, 1)).written()


class Heads(Protocol):
  """What a state tells of the tokens that it can read."""

  @property
  def length(self) -> Array:
    """`B`."""

  @property
  def heads(self) -> int:
    """B K."""

  @property
  def head_dim(self) -> int:
    """H."""

  @property
  def width(self) -> int:
    """h + 1."""


def check(state: Heads, q: Array, k: Array, v: Array, lead: str) -> None:
  """ValueError unless `B T N H`, `B T K H` and `B T K h` fit the state, each other and, where they
  are of one token, `lead` "B".
  """
  B, H, h = state.length.shape[0], state.head_dim, state.width - 1
  K, axes = state.heads // max(B, 1), len(lead.split())
  front = (B, *q.shape[1:axes])
  if (
    q.ndim != axes + 2
    or (q.shape[:axes], q.shape[-1]) != (front, H)
    or (k.shape, v.shape) != ((*front, K, H), (*front, K, h))
    or q.shape[-2] % K
  ):
    where = lead.replace(" ", ", ")
    raise ValueError(
      f"q, k and v must be [{where}, N, H], [{where}, K, H] and [{where}, K, h] with B={B}, K={K}, "
      f"H={H} and h={h} as in the state and K a divisor of N, not {list(q.shape)}, "
      f"{list(k.shape)} and {list(v.shape)}"
    )


@functools.partial(jax.jit, static_argnums=0)
def prefill[State](
  step: Callable[..., tuple[State, Array]],
  state: State,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K h"],
  lengths: Int[Array, " B"] | None,
) -> tuple[State, Float[Array, "B T N h"]]:
  """Folds step(state, q, k, v, valid) over the tokens; row b has `lengths[b]` of them."""
  B, T = q.shape[:2]
  lengths = shapes.row_lengths(lengths, B, T)

  def token(state, x):
    t, q, k, v = x
    return step(state, q, k, v, t < lengths)

  tokens = (jnp.arange(T, dtype=jnp.int32), *(x.swapaxes(0, 1) for x in (q, k, v)))
  state, out = lax.scan(token, state, tokens)
  return state, out.swapaxes(0, 1)
