"""Hard-max decoding in logarithmic time: keys of width 2 as lines in a tree over slopes.

    score[t, s] = q[t] . k[s]        a token inserts its key, then reads its best key's value

A query with q_y > 0 asks for the greatest k_x m + k_y at the slope m = q_x / q_y: which of the
lines is highest over m. A Li Chao tree answers (`attention.li_chao`): a path has 33 nodes at most,
whatever the keys, nothing is ever rebuilt, and no walk waits for another, so a token is 33
dependent steps. q_y < 0 asks a second tree of the keys turned around. A line that cannot be highest
any more is dropped, as a hull would drop it: of n Gaussian keys some dozens stay.

On a CPU the program is loops over single numbers, first all queries and then all keys, one after
the other (`attention.native`): a walk is some 20 steps of a few nanoseconds. That is one core;
`over_heads` uses all. On Hopper
GPUs each tree is a program of its own (`pallas_kernels.hull_hopper`), on TPUs the scalar core walks
all of them a level at a time (`pallas_kernels.hull_tpu`). Both pay where a scan of all keys
(`attention.ops.hardmax.step`) has some 10^7 of them to read, heads together, by calculation.

Ties, where scores are exact: equal keys share one entry, and all of them count. (Of floats that
rounding makes tie, a key that is equal to another may be missed, or the newest one counted twice.)
Queries along an axis, and q = 0, are answered by running extremes and totals, whose ties all count,
of any keys. Other distinct keys tie where their lines meet. Where float32 holds that slope, the
sign of a difference of heights is exact (dx m + dy, of differences that float32 holds), so all
lines that meet there lie on one path, and count, up to 33 of them. At other slopes, such as 1/3,
some may be missed: "average" is then the mean of some of the best, "latest" the last of some. The
score that is read is the best within the rounding of float32 in any case. `hardmax_attention`
counts all ties.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention import chips, dispatch, kernels, li_chao, native, plane
from attention.dispatch import Implementation
from pallas_kernels.hull import Inputs, Rules, Tree, score

_TILE = 1024  # numbers that a TPU lays out together: of whole ones rows are made without a copy


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
  stride: int = dataclasses.field(metadata={"static": True}, default=li_chao.WIDTH)
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
  def head_dim(self) -> int:
    """H."""
    return 2

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
  if num_kv_heads < 1 or num_heads % num_kv_heads:
    raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
  if jnp.dtype(dtype) != jnp.float32:
    raise ValueError(f"the state is float32, got dtype={jnp.dtype(dtype).name}")
  heads, width = batch * num_kv_heads, value_dim + 1
  stride, size = li_chao.WIDTH, max_length + 1
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
    entries=jnp.zeros(entries, jnp.float32),
    extremes=jnp.full((5, heads), -jnp.inf, jnp.float32).at[0].set(0.0),
    along_axes=jnp.zeros((5, heads, width), jnp.float32),
    length=jnp.zeros(batch, jnp.int32),
    steps=jnp.zeros((), jnp.int32),
    ties=ties,
    stride=stride,
  )


def _spare(stride: int) -> int:
  """Numbers behind the trees, which are nobody's."""
  return stride if stride == li_chao.WIDTH else _TILE


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
  native.check(state, q, k, v, "B T")
  return native.prefill(_step_by(implementation), state, q, k, v, lengths)


@functools.cache
def _step_by(implementation: str | None) -> Callable[..., tuple[HullState, Array]]:
  """`_step`, the same object for the same name: JAX keeps what it compiles by it."""
  return functools.partial(_step, implementation)


def step(
  state: HullState,
  q: Float[Array, "B N 2"],
  k: Float[Array, "B K 2"],
  v: Float[Array, "B K h"],
  *,
  implementation: str | None = None,
) -> tuple[HullState, Float[Array, "B N h"]]:
  """Reads one token, its own key included, in at most 33 dependent steps: keys and queries go down
  the trees that the tokens before have left, and no walk waits for another.

  Donate the state to the jitted function that calls this, or all of it is copied.
  `implementation` is "loops", for CPUs, "hopper" or "tpu"; None: the kernel on its chip, else
  loops.
  """
  native.check(state, q, k, v, "B")
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
    jnp.concatenate([value, jnp.ones((X, 1), jnp.float32)], axis=1),
    jnp.repeat(valid & (state.steps < state.capacity), k.shape[1]),
    q.reshape(-1, 2).astype(jnp.float32),
  )
  state, read = dispatch.run(implementation, IMPLEMENTATIONS, (state, token))
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


def _sink(ties: str, stride: int, base: Array, carry: tuple[native.Rows, li_chao.Sinking]):
  nodes, c = carry
  array, at = nodes.written(), base + stride * c.node
  row, c = li_chao.meet(ties, native.row(array, at, li_chao.WIDTH), c)
  return native.Rows(array, at, jnp.stack(row)), c


def _by_loops(state: HullState, token: _Token) -> tuple[HullState, Array]:
  found = _seek_all(state, token)
  state, merged = _insert_all(state, token, found[0])
  state = _remember(native.entered, state, token, merged)
  return state, _read_all(state, token, found, merged)


def _insert_all(state: HullState, token: _Token, after: Array) -> tuple[HullState, Array]:
  """All keys into both trees of their heads, once `after` is known; and the entries that they
  merged with, by tree.
  """
  size, key = state.stride * state.size, token.key.reshape(-1)

  def one(tree, carry):
    nodes, used, merged = carry
    head, sign = tree >> 1, jnp.where(tree & 1 == 0, 1.0, -1.0)
    x, y = (sign * native.get(key, 2 * head + i) for i in (0, 1))
    keep = native.get(token.keep, head).astype(jnp.int32)
    c = li_chao.start_sinking(x, y, state.steps, native.get(used, tree), keep)
    sink = functools.partial(_sink, state.ties, state.stride, tree * size)
    nodes, c = lax.while_loop(lambda c: c[1].going != 0, sink, (nodes, c))
    return nodes, native.put(used, tree, c.used), native.put(merged, tree, c.merged)

  nodes = native.unwritten(state.nodes, li_chao.WIDTH, after)
  start = nodes, state.used, jnp.full_like(state.used, -1)
  nodes, used, merged = native.times(state.used.shape[0], one, start)
  return dataclasses.replace(state, nodes=nodes.written(), used=used), merged


def _seek_all(state: HullState, token: _Token) -> Array:
  """All queries down trees that do not hold this token's keys. Of each: twice the number of entries
  found, and 1 more if its own key is as good; then these entries.
  """
  query, key, asks = token.query.reshape(-1), token.key.reshape(-1), token.query.shape[0]

  def one(ask, found):
    head = lax.div(ask, jnp.int32(token.group))
    vector = lambda x, at: (native.get(x, 2 * at), native.get(x, 2 * at + 1))
    asking = li_chao.asking(
      state.ties, plane.score, vector(query, ask), vector(key, head),
      native.get(token.keep, head), state.steps,
    )  # fmt: skip
    tree = 2 * head + asking.second
    base, first = tree * state.stride * state.size, ask * (li_chao.FOUND + 1)

    def seek(carry):
      found, c = carry
      row = native.row(state.nodes, base + state.stride * c.node, li_chao.WIDTH)
      c, slot, entry = asking.seek(row, c)
      return native.put(found, first + 1 + slot, entry), c

    start = found, asking.start(native.get(state.used, tree))
    found, c = lax.while_loop(lambda c: c[1].going != 0, seek, start)
    return native.put(found, first, 2 * c.count + asking.own_is_best(c))

  return native.times(asks, one, jnp.zeros(asks * (li_chao.FOUND + 1), jnp.int32))


def _read_all(state: HullState, token: _Token, found: Array, merged: Array) -> Array:
  """What all queries read, sums and numbers."""
  heads, asks, w = state.heads, token.query.shape[0], state.width
  query, along_axes = token.query.reshape(-1), state.along_axes.reshape(-1)

  def one(ask, out):
    head, first = lax.div(ask, jnp.int32(token.group)), ask * (li_chao.FOUND + 1)
    x, y = native.get(query, 2 * ask), native.get(query, 2 * ask + 1)
    merge = native.get(merged, 2 * head + (y < 0).astype(jnp.int32))
    count, own = (native.get(found, first) >> 1, native.get(found, first) & 1)
    entry, total = li_chao.with_own(state.ties, count, own, state.steps, merge)

    def add(i, out):
      token = jnp.where(i == count, entry, native.get(found, first + 1 + i))
      start = (token * heads + head) * w
      return native.add(out, ask * w, state.entries, start, jnp.int32(w), i == 0)

    out = lax.fori_loop(0, total, add, out)
    axis = (x == 0) | (y == 0)
    start = (_side(x, y) * heads + head) * w
    return native.add(out, ask * w, along_axes, start, jnp.where(axis, w, 0), True)

  start = native.unwritten(jnp.zeros(asks * w + 1, jnp.float32), 1)
  return native.times(asks, one, start).written()[:-1].reshape(asks, w)


# On a chip: each tree is a program, and what is left of a step is array operations.


def _on_chip(name: str, state: HullState, token: _Token) -> tuple[HullState, Array]:
  chip = kernels.module("hull", name)
  tree = Tree(state.size, li_chao.WIDTH, state.stride, li_chao.FOUND)
  of = functools.partial
  rules = Rules(
    li_chao.start_sinking, of(li_chao.meet, state.ties), of(li_chao.asking, state.ties, score),
    of(li_chao.with_own, state.ties),
  )  # fmt: skip
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
  if state.stride == li_chao.WIDTH:
    return chips.not_tpu() or "the state was not made on a TPU"
  chip = kernels.module("hull", "tpu")
  return chips.not_tpu() or chip.unsupported(state.used.shape[0], token.query.shape[0])


IMPLEMENTATIONS: Mapping[str, Implementation] = {
  "hopper": Implementation(lambda call: _on_chip("hopper", *call), lambda call: chips.not_hopper()),
  "tpu": Implementation(lambda call: _on_chip("tpu", *call), _not_for_a_tpu),
  "loops": Implementation(lambda call: _by_loops(*call), lambda call: None),
}
