"""Hard-max decoding in logarithmic time: keys of width 2 as lines in a tree over slopes.

    score[t, s] = q[t] . k[s]        a token inserts its key, then reads its best key's value

A query with q_y > 0 asks for the greatest k_x m + k_y at the slope m = q_x / q_y: which of the
lines is highest over m. A Li Chao tree answers (Li 2013; `cp-algorithms.com/geometry/convex_hull_
trick.html`): each node halves an interval of slopes and holds the line that is highest at its
middle; the loser there sinks to the only side where it can still win. Slopes are float32 read as
ordered integers, so a path has 33 nodes at most, whatever the keys, and nothing is ever rebuilt.
q_y < 0 asks a second tree of the keys turned around. A line that loses at both ends of the interval
it would sink into is dropped, as a hull would drop it: of n Gaussian keys some dozens stay.

On a CPU the program is loops over single numbers, all trees in turn (`attention.native`): a walk
down one is some 20 steps of a few nanoseconds. That is one core; `over_heads` uses all. On Hopper
GPUs each tree is a program of its own (`pallas_kernels.hull_hopper`), on TPUs the scalar core walks
all of them a level at a time (`pallas_kernels.hull_tpu`). Both pay where a scan of all keys
(`attention.ops.hardmax.step`) has some 10^7 of them to read, heads together, by calculation.

Ties, exactly: equal keys share one entry, and all of them count. Queries along an axis, and q = 0,
are answered by running extremes and totals, whose ties all count. Other distinct keys tie where
their lines meet. Where float32 holds that slope, the sign of a difference of heights is exact
(dx m + dy, of differences that float32 holds), so all lines that meet there lie on one path, and
count, up to 33 of them. At other slopes, such as 1/3, some may be missed: "average" is then the
mean of some of the best, "latest" the last of some. The score that is read is the best within the
rounding of float32 in any case. `hardmax_attention` counts all ties.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention import chips, kernels, native, plane
from attention.dispatch import Implementation, choose
from pallas_kernels.hull import Inputs, Rules, Tree, score

_DEPTH = 33
_WIDTH = 5  # numbers in a node
_TILE = 1024  # numbers that a TPU lays out together: of whole ones rows are made without a copy
_LARGEST = float(jnp.finfo(jnp.float32).max)
_ENDS = [int(x) for x in np.array([-_LARGEST, _LARGEST], np.float32).view(np.uint32)]
_SLOPES = (0xFFFFFFFF ^ _ENDS[0], 0x80000000 | _ENDS[1])
"""The least and the greatest slope, as `plane.ordered_bits` numbers them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HullState:
  """What a head has read. Of C tokens, K key heads in B rows are 2 B K trees."""

  nodes: Int[Array, " 2BK*(C+1)*5+5"]
  """x and y (the bits of float32), entry, left child, right child; 0 is no child. Each tree's lie
  together, its root first. The last one is nobody's. (On a TPU nodes have room for 8 numbers.)
  """
  used: Int[Array, " 2BK"]
  """The number of nodes of each tree."""
  entries: Float[Array, " (C+1)*BK*w"]
  """What is read of each token and head, w = h + 1 numbers: the sum of the values of equal keys and
  their number, or the last one's value and 1. The last token's are nobody's.
  """
  extremes: Float[Array, "5 BK"]
  """What the keys that an axis asks for have in common: 0, the greatest x, -x, y, -y."""
  along_axes: Float[Array, "5 BK w"]
  """Their entries."""
  length: Int[Array, " B"]
  """The number of tokens read, by row."""
  steps: Int[Array, ""]
  """The number of steps taken, padding included: the capacity bounds it."""
  ties: str = dataclasses.field(metadata={"static": True}, default="average")
  stride: int = dataclasses.field(metadata={"static": True}, default=_WIDTH)
  """Numbers from node to node: 5, or 8 on a TPU."""

  @property
  def heads(self) -> int:
    """B K."""
    return self.used.shape[0] // 2

  @property
  def capacity(self) -> int:
    """C: tokens there is room for."""
    return self.entries.shape[0] // (self.heads * self.width) - 1

  @property
  def size(self) -> int:
    """Nodes that each tree has room for."""
    return (self.nodes.shape[0] - _spare(self.stride)) // (self.stride * self.used.shape[0])

  @property
  def width(self) -> int:
    """h + 1."""
    return self.along_axes.shape[2]


def init_state(
  batch: int,
  *,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int = 2,
  value_dim: int,
  max_length: int,
  dtype: Any = jnp.float32,
  ties: str = "average",
) -> HullState:
  """A state that has read nothing, with room for `max_length` tokens: 40 bytes a token and key
  head (64 on a TPU), and 4 (h + 1). Tokens beyond are not kept.

  Raises: ValueError: other widths than 2, other ties, or more than int32 can number.
  """
  if head_dim != 2:
    raise ValueError(f"a hull is for heads of width 2, got head_dim={head_dim}")
  plane.check_ties(ties)
  if num_heads % num_kv_heads:
    raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
  if jnp.dtype(dtype) != jnp.float32:
    raise ValueError(f"the state is float32, got dtype={jnp.dtype(dtype).name}")
  heads, width = batch * num_kv_heads, value_dim + 1
  stride, size = _WIDTH, max_length + 1
  if chips.not_tpu() is None:
    stride, size = 8, -(-size * 8 // _TILE) * _TILE // 8
  nodes = 2 * heads * size * stride + _spare(stride)
  entries = (max_length + 1) * heads * width
  if max(nodes, entries) >= 2**31:
    raise ValueError(
      f"max_length={max_length} with {heads} key heads is more than int32 can number"
    )
  return HullState(
    nodes=jnp.zeros(nodes, jnp.int32),
    used=jnp.zeros(2 * heads, jnp.int32),
    entries=jnp.zeros(entries),
    extremes=jnp.full((5, heads), -jnp.inf).at[0].set(0.0),
    along_axes=jnp.zeros((5, heads, width)),
    length=jnp.zeros(batch, jnp.int32),
    steps=jnp.zeros((), jnp.int32),
    ties=ties,
    stride=stride,
  )


def _spare(stride: int) -> int:
  """Numbers behind the trees, which are nobody's."""
  return stride if stride == _WIDTH else _TILE


def prefill(
  state: HullState,
  q: Float[Array, "B T N 2"],
  k: Float[Array, "B T K 2"],
  v: Float[Array, "B T K h"],
  *,
  lengths: Int[Array, " B"] | None = None,
  implementation: str | None = None,
) -> tuple[HullState, Float[Array, "B T N h"]]:
  """Reads T tokens after those that the state holds, in one compiled loop. Row b has `lengths[b]`
  of them; the rest is padding, which takes room, and its outputs are 0.
  """
  return native.prefill(functools.partial(_step, implementation), state, q, k, v, lengths)


def step(
  state: HullState,
  q: Float[Array, "B N 2"],
  k: Float[Array, "B K 2"],
  v: Float[Array, "B K h"],
  *,
  implementation: str | None = None,
) -> tuple[HullState, Float[Array, "B N h"]]:
  """Reads one token, its own key included: 33 dependent reads at most on a chip, where queries go
  down beside the key. Loops take one walk after the other.

  Donate the state to the jitted function that calls this, or all of it is copied.
  `implementation` is "loops", for CPUs, "hopper" or "tpu"; None: the kernel on its chip, else
  loops.
  """
  return _step(implementation, state, q, k, v, jnp.ones(q.shape[:1], bool))


class Functions(NamedTuple):
  """This module's functions of these names, on a mesh."""

  init_state: Callable[..., HullState]
  prefill: Callable[..., tuple[HullState, Array]]
  step: Callable[..., tuple[HullState, Array]]


def over_heads(mesh: jax.sharding.Mesh, axis: str) -> Functions:
  """Decoding with the heads cut over an axis of the mesh: how a CPU uses more than one core, after
  `jax.config.update("jax_num_cpu_devices", 2)`.

  Raises: ValueError: an axis that the mesh lacks, or heads that its devices do not divide.
  """
  if axis not in mesh.shape:
    raise ValueError(f"the mesh has no axis {axis!r}, but {', '.join(mesh.axis_names)}")
  devices, P = mesh.shape[axis], jax.P
  cut = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

  def where(state: HullState) -> HullState:
    parts: list[Any] = [P(axis)] * 3 + [P(None, axis)] * 2 + [P()] * 2
    return HullState(*parts, ties=state.ties, stride=state.stride)

  def init(batch, *, num_heads, num_kv_heads, **others):
    for name, heads in ("num_heads", num_heads), ("num_kv_heads", num_kv_heads):
      if heads % devices:
        raise ValueError(f"{name}={heads} must be a multiple of {devices}, the devices of {axis!r}")
    few = {"num_heads": num_heads // devices, "num_kv_heads": num_kv_heads // devices}
    make = functools.partial(init_state, batch, **few, **others)
    return jax.jit(cut(make, in_specs=(), out_specs=where(jax.eval_shape(make))))()

  def read(state, q, k, v, *, lengths=None, implementation=None):
    run = lambda *inputs: prefill(*inputs[:4], lengths=inputs[4], implementation=implementation)
    return over(run, P(None, None, axis), state, q, k, v, lengths)

  def one(state, q, k, v, *, implementation=None):
    return over(
      functools.partial(step, implementation=implementation), P(None, axis), state, q, k, v
    )

  def over(run, heads, state, q, k, v, *whole):
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    given = [place(x, heads) for x in (q, k, v)] + [place(x, P()) for x in whole]
    cuts = where(state), *[heads] * 3, *[P()] * len(whole)
    return cut(run, in_specs=cuts, out_specs=(cuts[0], heads))(state, *given)

  return Functions(init, read, one)


class _Token(NamedTuple):
  """What one step brings, X = B K heads."""

  key: Float[Array, "X 2"]
  new: Float[Array, "X w"]
  """Its entries."""
  keep: Bool[Array, " X"]
  query: Float[Array, "G*X 2"]
  """Of each head its G queries in a row."""

  @property
  def group(self) -> int:
    """G."""
    return self.query.shape[0] // self.key.shape[0]


def _step(
  implementation: str | None, state: HullState, q: Array, k: Array, v: Array, valid: Array
) -> tuple[HullState, Array]:
  B, X = q.shape[0], k.shape[0] * k.shape[1]
  value = v.astype(jnp.float32).reshape(X, -1)
  token = _Token(
    k.reshape(X, 2).astype(jnp.float32),
    jnp.concatenate([value, jnp.ones((X, 1))], axis=1),
    jnp.repeat(valid & (state.steps < state.capacity), k.shape[1]),
    q.reshape(-1, 2).astype(jnp.float32),
  )
  form = IMPLEMENTATIONS[choose(implementation, IMPLEMENTATIONS, (state, token))]
  state, read = form.run((state, token))
  read = read[:, :-1] / jnp.maximum(read[:, -1:], 1.0)
  out = jnp.where(valid[:, None, None], read.reshape(B, q.shape[1], -1), 0.0).astype(v.dtype)
  length = state.length + valid.astype(jnp.int32)
  return dataclasses.replace(state, length=length, steps=state.steps + 1), out


def _remember(
  enter: Callable[[Array, Array, Array, Array | None], Array],
  state: HullState, token: _Token, merged: Array,
) -> HullState:  # fmt: skip
  """The entries of a token whose keys are in the trees; they merged with these, by tree."""
  merges = None if state.ties == "latest" else merged.reshape(-1, 2)
  entries = enter(state.entries, state.steps, token.new, merges)
  return dataclasses.replace(_along_axes(state, token), entries=entries)


def _side(x: Array, y: Array) -> Array:
  """Which of `HullState.extremes` a query along an axis asks for."""
  return jnp.where(x > 0, 1, jnp.where(x < 0, 2, jnp.where(y > 0, 3, jnp.where(y < 0, 4, 0))))


def _along_axes(state: HullState, token: _Token) -> HullState:
  """What queries along an axis read, with one more key."""
  (x, y), new, keep = token.key.T, token.new, token.keep
  sides = jnp.stack([jnp.zeros_like(x), x, -x, y, -y])
  more, tie = keep[None] & (sides > state.extremes), keep[None] & (sides == state.extremes)
  joined = new[None] if state.ties == "latest" else state.along_axes + new[None]
  entries = jnp.where(tie[..., None], joined, state.along_axes)
  entries = jnp.where(more[..., None], new[None], entries)
  extremes = jnp.where(more, sides, state.extremes)
  return dataclasses.replace(state, extremes=extremes, along_axes=entries)


class _Line(NamedTuple):
  """A key of one tree."""

  x: Array
  y: Array
  entry: Array


class _Place(NamedTuple):
  """The slopes that a node answers for, as ordered integers."""

  low: Array
  high: Array

  @property
  def middle(self) -> Array:
    return self.low + ((self.high - self.low) >> 1)

  def half(self, right: Array) -> "_Place":
    middle = self.middle
    return _Place(jnp.where(right, middle + 1, self.low), jnp.where(right, self.high, middle))


def _root() -> _Place:
  return _Place(*(jnp.uint32(end) for end in _SLOPES))


def _lead(one: _Line, other: _Line, slope: Array) -> Array:
  """How much higher the first line is. Where a product overflows, its sign is what counts."""
  return (one.x - other.x) * slope + (one.y - other.y)


class _Sinking(NamedTuple):
  """A line on its way down."""

  node: Array
  """Where it comes to."""
  place: _Place
  """Of the node before."""
  turned: Array
  """What was decided there, packed: whether it went right; whether nothing was, at the root; ..."""
  line: _Line
  used: Array
  merged: Array
  """The entry of a key that is equal, or -1."""
  going: Array
  """0 at the end."""


def _start_sinking(x: Array, y: Array, token: Array, used: Array, keep: Array) -> _Sinking:
  root, turned = jnp.int32(0), native.pack(jnp.array(False), jnp.array(True))
  return _Sinking(root, _root(), turned, _Line(x, y, token), used, jnp.int32(-1), keep)


def _meet(ties: str, row: Any, c: _Sinking) -> tuple[tuple[Array, ...], _Sinking]:
  """The line meets a node, whose numbers are `row`: the better one stays, the other goes on."""
  there, line = _Line(native.floats(row[0]), native.floats(row[1]), row[2]), c.line
  right, root = native.unpack(c.turned, 2)
  place = _Place(
    *(jnp.where(root, a, b) for a, b in zip(c.place, c.place.half(right), strict=True))
  )
  empty = c.node == c.used
  lead = _lead(line, there, plane.from_ordered_bits(place.middle))
  same = line.x == there.x
  equal = same & (line.y == there.y) & ~empty
  # Of lines that meet in the middle the flatter one sinks: the left half has the middle.
  wins = jnp.where(same, line.y > there.y, (lead > 0) | ((lead == 0) & (line.x > there.x)))
  wins = empty | wins | (equal if ties == "latest" else False)
  right = ((line.x > there.x) != wins) & ~same
  turned = native.pack(right, jnp.array(False), wins, empty, same, equal, lead != 0)
  right, _, wins, empty, same, equal, apart = native.unpack(turned, 7)
  choose = lambda a, b: _Line(*(jnp.where(wins, x, y) for x, y in zip(a, b, strict=True)))
  upper, lower = choose(line, there), choose(there, line)
  end = plane.from_ordered_bits(jnp.where(right, place.high, place.low))
  hopeless = apart & (_lead(lower, upper, end) < 0)
  stop = empty | same | hopeless | (place.low == place.high)
  child = jnp.where(right, row[4], row[3])
  new = ~stop & (child == 0)
  child = jnp.where(new, c.used, child)
  left, right_child = (jnp.where(empty, 0, x) for x in (row[3], row[4]))
  row = (
    native.bits(upper.x), native.bits(upper.y), upper.entry,
    jnp.where(new & ~right, child, left), jnp.where(new & right, child, right_child),
  )  # fmt: skip
  merged = c.merged if ties == "latest" else jnp.where(equal, there.entry, c.merged)
  used, going = c.used + empty.astype(jnp.int32), jnp.where(stop, 0, 1)
  return row, _Sinking(child, place, turned, lower, used, merged, going)


def _sink(ties: str, stride: int, base: Array, carry: tuple[native.Rows, _Sinking]):
  nodes, c = carry
  array, at = nodes.written(), base + stride * c.node
  row, c = _meet(ties, native.row(array, at, _WIDTH), c)
  return native.Rows(array, at, jnp.stack(row)), c


def _by_loops(state: HullState, token: _Token) -> tuple[HullState, Array]:
  state, merged = _insert_all(state, token)
  state = _remember(native.entered, state, token, merged)
  return state, _query_all(state, token)


def _insert_all(state: HullState, token: _Token) -> tuple[HullState, Array]:
  """All keys into both trees of their heads; and the entries that they merged with, by tree."""
  size, key = state.stride * state.size, token.key.reshape(-1)

  def one(tree, carry):
    nodes, used, merged = carry
    head, sign = tree >> 1, jnp.where(tree & 1 == 0, 1.0, -1.0)
    x, y = (sign * native.get(key, 2 * head + i) for i in (0, 1))
    keep = native.get(token.keep, head).astype(jnp.int32)
    c = _start_sinking(x, y, state.steps, native.get(used, tree), keep)
    sink = functools.partial(_sink, state.ties, state.stride, tree * size)
    nodes, c = lax.while_loop(lambda c: c[1].going != 0, sink, (nodes, c))
    return nodes, native.put(used, tree, c.used), native.put(merged, tree, c.merged)

  start = native.unwritten(state.nodes, _WIDTH), state.used, jnp.full_like(state.used, -1)
  nodes, used, merged = lax.fori_loop(0, state.used.shape[0], one, start)
  return dataclasses.replace(state, nodes=nodes.written(), used=used), merged


class _Seeking(NamedTuple):
  """A query on its way down."""

  node: Array
  """Where it comes to."""
  place: _Place
  """Of that node."""
  best: Array
  last: Array
  """The last entry that has the best score."""
  count: Array
  """How many entries count: of what was found the first ones."""
  going: Array
  """0 at the end."""


def _start_seeking(x: Array, y: Array, used: Array) -> _Seeking:
  """Along an axis what is read is known without a walk."""
  going = jnp.where((x == 0) | (y == 0) | (used == 0), 0, 1)
  none = jnp.int32(0)
  return _Seeking(none, _root(), jnp.float32(-jnp.inf), none, none, going)


def _look(
  ties: str, score: Callable[..., Array], aim: plane.Direction, row: Any, c: _Seeking
) -> tuple[_Seeking, Array, Array]:
  """The query meets a node, whose numbers are `row`: where among what was found to put which entry.
  What is put behind those that count is overwritten.
  """
  height = score((aim.x, aim.y), (native.floats(row[0]), native.floats(row[1])))
  better, tie = height > c.best, height == c.best
  slot, entry = jnp.where(better, 0, c.count), row[2]
  count = slot + (better | tie).astype(jnp.int32)
  last = jnp.where(better, entry, jnp.where(tie, jnp.maximum(entry, c.last), c.last))
  if ties == "latest":
    slot, entry, count = jnp.int32(0), last, jnp.int32(1)
  slope = plane.ordered_bits(jnp.clip(aim.slope, -_LARGEST, _LARGEST))
  right = slope > c.place.middle
  child = jnp.where(right, row[4], row[3])
  going = jnp.where((child == 0) | (c.place.low == c.place.high), 0, 1)
  best = jnp.maximum(c.best, height)
  return _Seeking(child, c.place.half(right), best, last, count, going), slot, entry


def _query(state: HullState, head: Array, x: Array, y: Array, found: Array) -> tuple[Array, Array]:
  """The entries that one query reads, and their number: a buffer's first ones."""
  aim = plane.direction(x, y)
  tree = 2 * head + aim.lower.astype(jnp.int32)
  base = tree * state.stride * state.size

  def seek(carry):
    found, c = carry
    row = native.row(state.nodes, base + state.stride * c.node, _WIDTH)
    c, slot, entry = _look(state.ties, plane.score, aim, row, c)
    return native.put(found, slot, entry), c

  start = found, _start_seeking(x, y, native.get(state.used, tree))
  found, c = lax.while_loop(lambda c: c[1].going != 0, seek, start)
  return found, c.count


def _query_all(state: HullState, token: _Token) -> Array:
  """What all queries read, sums and numbers."""
  heads, asks, w = state.heads, token.query.shape[0], state.width
  query, along_axes = token.query.reshape(-1), state.along_axes.reshape(-1)

  def one(ask, carry):
    found, out = carry
    head = lax.div(ask, jnp.int32(token.group))
    x, y = native.get(query, 2 * ask), native.get(query, 2 * ask + 1)
    found, count = _query(state, head, x, y, found)

    def add(i, out):
      start = (native.get(found, i) * heads + head) * w
      return native.add(out, ask * w, state.entries, start, jnp.int32(w), i == 0)

    out = lax.fori_loop(0, count, add, out)
    axis = (x == 0) | (y == 0)
    side = _side(x, y)
    start = (side * heads + head) * w
    return found, native.add(out, ask * w, along_axes, start, jnp.where(axis, w, 0), True)

  start = jnp.zeros(_DEPTH + 1, jnp.int32), native.unwritten(jnp.zeros(asks * w + 1), 1)
  return lax.fori_loop(0, asks, one, start)[1].written()[:-1].reshape(asks, w)


# On a chip: each tree is a program, and what is left of a step is array operations.


def _on_chip(name: str, state: HullState, token: _Token) -> tuple[HullState, Array]:
  chip = kernels.module("hull", name)

  def walk(x, y):
    aim = plane.direction(x, y)
    look = functools.partial(_look, state.ties, score, aim)
    return aim.lower.astype(jnp.int32), functools.partial(_start_seeking, x, y), look

  tree = Tree(state.size, _WIDTH, state.stride, _DEPTH + 1)
  rules = Rules(_start_sinking, functools.partial(_meet, state.ties), walk)
  given = Inputs(
    state.nodes, state.used, token.key, token.keep.astype(jnp.int32), state.steps[None],
    token.query,
  )  # fmt: skip
  nodes, walked = chip.step(given, tree, rules)
  state = dataclasses.replace(state, nodes=nodes, used=walked.used)
  state = _remember(_enter_on_chip, state, token, walked.merged)
  return state, _read_on_chip(state, token, walked.found, walked.count)


def _places(token: Array, heads: int, head: Array, w: int) -> Array:
  """Where in `HullState.entries` the numbers of some tokens' heads are. Those arrays stay flat: to
  make rows of them a TPU would copy them.
  """
  first = ((token * heads + head) * w)[..., None]
  return first + lax.broadcasted_iota(jnp.int32, (*first.shape[:-1], w), first.ndim - 1)


def _enter_on_chip(entries: Array, token: Array, new: Array, merged: Array | None) -> Array:
  heads, w = new.shape
  capacity = entries.shape[0] // (heads * w) - 1
  entries = native.put_row(entries, jnp.minimum(token, capacity) * heads * w, new.reshape(-1))
  if merged is None:
    return entries
  first, second = merged.T
  both = jnp.stack([first, jnp.where(second == first, -1, second)])
  both = jnp.where(both < 0, capacity + 1, both)
  places = _places(both, heads, jnp.arange(heads, dtype=jnp.int32)[None], w)
  return entries.at[places].add(jnp.stack([new, new]), mode="drop")


def _read_on_chip(state: HullState, token: _Token, found: Array, count: Array) -> Array:
  """What all queries read, sums and numbers, of the first `count` entries that each one found."""
  head = jnp.arange(token.query.shape[0], dtype=jnp.int32) // token.group
  counts = jnp.arange(found.shape[1])[None] < count[:, None]
  tokens = jnp.where(counts, found, 0)
  read = state.entries[_places(tokens, state.heads, head[:, None], state.width)]
  out = jnp.where(counts[..., None], read, 0.0).sum(1)
  x, y = token.query.T
  axis = ((x == 0) | (y == 0))[:, None]
  return jnp.where(axis, state.along_axes[_side(x, y), head], out)


def _not_for_a_tpu(call: tuple[HullState, _Token]) -> str | None:
  state, token = call
  if state.stride == _WIDTH:
    return chips.not_tpu() or "the state was not made on a TPU"
  chip = kernels.module("hull", "tpu")
  return chips.not_tpu() or chip.unsupported(state.used.shape[0], token.query.shape[0])


IMPLEMENTATIONS: Mapping[str, Implementation] = {
  "hopper": Implementation(lambda call: _on_chip("hopper", *call), lambda call: chips.not_hopper()),
  "tpu": Implementation(lambda call: _on_chip("tpu", *call), _not_for_a_tpu),
  "loops": Implementation(lambda call: _by_loops(*call), lambda call: None),
}
