"""What the tests of hard-max attention share: keys that are hard, a dense scan in NumPy, calls of
the kernels.
"""

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kit
from attention import hardmax_tiled, hull, masks
from pallas_kernels import aot

FAMILIES = ("gaussian", "parabola", "circle", "grid", "collinear")


class Answer(NamedTuple):
  """Of each query of one head."""

  score: np.ndarray  # T: the best score, -inf where no key is seen
  count: np.ndarray  # T: how many keys have it
  last: np.ndarray  # T: the last of them
  tied: np.ndarray  # T S, bool: which they are

  def average(self, v):
    """The mean of the winners' values, float64."""
    return self.tied @ v.astype(np.float64) / np.maximum(self.count, 1)[:, None]

  def average_gradient(self, g):
    """What the values get."""
    return (self.tied / np.maximum(self.count, 1)[:, None]).T @ g.astype(np.float64)


def planar(family: str, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Queries and keys `length 2`, float32. Some queries of every family look along an axis, or
  nowhere. The parabola, the grid and the lines are made of integers, so their scores are exact.
  """
  rng = np.random.default_rng([seed, FAMILIES.index(family)])
  if family == "gaussian":
    q, k = rng.normal(size=(2, length, 2))
  elif family == "parabola":
    i = rng.integers(-300, 301, length)
    q = np.stack([rng.integers(-300, 301, length), np.ones(length)], 1)
    k = np.stack([2 * i, -(i**2)], 1)
  elif family == "circle":
    turn = rng.uniform(0, 2 * np.pi, (2, length))
    q, k = np.stack([np.cos(turn), np.sin(turn)], -1)
  elif family == "grid":
    q, k = rng.integers(-4, 5, (2, length, 2))
  else:
    q = rng.integers(-3, 4, (length, 2))
    along = np.array([[1, 2], [3, -1], [0, 1], [1, 0]])[rng.integers(0, 4, length)]
    k = rng.integers(-20, 21, (length, 1)) * along + rng.integers(0, 2, (length, 2))
  q = q.astype(np.float32)
  for i, fixed in enumerate(((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))):
    q[7 + 3 * i :: 31] = fixed
  return q, k.astype(np.float32)


def scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
  """In the dtype of the inputs, every product rounded, added in order: `T S`."""
  s = q[:, None, 0] * k[None, :, 0]
  for c in range(1, q.shape[1]):
    s = s + q[:, None, c] * k[None, :, c]
  return s


def scan(q: np.ndarray, k: np.ndarray, causal: bool | np.ndarray = True) -> Answer:
  """Every query by all of its scores; or by those that a mask `T S` allows."""
  s = scores(q, k)
  if isinstance(causal, bool):
    causal = np.tri(*s.shape, dtype=bool) if causal else np.ones(s.shape, bool)
  s = np.where(causal, s, -np.inf)
  score = s.max(1)
  tied = (s == score[:, None]) & causal
  last = np.where(tied, np.arange(len(k)), -1).max(1)
  return Answer(score, tied.sum(1), last, tied)


def relative_regret(q: np.ndarray, k: np.ndarray, chosen: np.ndarray, causal: bool = True) -> float:
  """By how much the chosen keys' scores miss the best ones in float64, over the size of the
  greatest terms.
  """
  q, k = q.astype(np.float64), k.astype(np.float64)
  lost = scan(q, k, causal).score - (q * k[chosen]).sum(1)
  return float(lost.max() / (np.abs(q).sum(1).max() * np.abs(k).max()))


MASKS = {
  "causal": (150, 150, masks.causal()),
  "keys before the queries": (70, 200, masks.causal(130)),
  "nothing to see": (90, 40, masks.causal(-60)),
  "window": (500, 500, masks.sliding_window(300)),
  "one query": (1, 300, masks.everything()),
  "every key": (40, 300, masks.everything()),
}
"""T, S, mask. In blocks of 128 the window's last queries visit a full block before an earlier one
that is mixed.
"""


def check_kernel(chip: str, T: int, S: int, mask: masks.Mask) -> None:
  """The winners, the means and the values' gradient, by a chip's kernel in its interpreter, of a
  head for each family. Numbers have few bits, so that products are exact: XLA may fuse them here.
  """
  given = [[planar(family, length)[i] for family in FAMILIES] for i, length in enumerate((T, S))]
  q, k = (np.round(64 * np.stack(x, 1)) / 64 for x in given)
  make = kit.keys()
  v, g = kit.normal(next(make), S, len(FAMILIES), 3), kit.normal(next(make), T, len(FAMILIES), 3)

  @jax.jit
  def run(q, k, v, g):
    def loss(v):
      out, winners = hardmax_tiled.attend(
        q[None], k[None], v[None], mask, ties="average", chip=chip
      )
      return (out[0] * g).sum(), (out[0], jax.tree.map(lambda x: x[0], winners))

    (_, aux), dv = jax.value_and_grad(loss, has_aux=True)(v)
    return *aux, dv

  out, winners, dv = run(jnp.asarray(q), jnp.asarray(k), v, g)
  seen = np.asarray(mask.as_array(T, S))[0, 0]
  for n, family in enumerate(FAMILIES):
    expected = scan(q[:, n], k[:, n], seen)
    for name, x in winners._asdict().items():
      np.testing.assert_array_equal(x[:, n], getattr(expected, name), f"{family} {name}")
    kit.assert_close(f"{family} out", out[:, n], expected.average(np.asarray(v)[:, n]))
    kit.assert_close(f"{family} dv", dv[:, n], expected.average_gradient(np.asarray(g)[:, n]))


def check_shared_heads(chip: str) -> None:
  """Wide heads, two to a key head, under vmap: as without the kernel."""
  rng = np.random.default_rng(0)
  integers = lambda *shape: jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)
  q, k, v = integers(2, 1, 40, 2, 5), integers(2, 1, 50, 1, 5), integers(2, 1, 50, 1, 3)

  def run(chip):
    attend = lambda *qkv: hardmax_tiled.attend(*qkv, masks.causal(10), ties="latest", chip=chip)
    return jax.jit(jax.vmap(attend))(q, k, v)

  jax.tree.map(np.testing.assert_array_equal, run(chip), run(None))


def lowered(chip: str, H: int) -> None:
  """Lowers the whole call for a chip; several compilers' refusals come here."""
  name = "hopper" if chip == "h200" else "tpu"
  q, k = (jax.ShapeDtypeStruct((2, length, 4, H), jnp.float32) for length in (70, 300))
  attend = lambda q, k: hardmax_tiled.attend(q, k, k, masks.causal(230), ties="average", chip=name)
  aot.lower_for(aot.CHIPS[chip], attend, q, k)


_COMPILE = """
import jax, jax.numpy as jnp
from attention import hardmax_tiled, hull, masks
from pallas_kernels import aot
x = jax.ShapeDtypeStruct((1, 600, 1, 2), jnp.float32)
attend = lambda q, k: hardmax_tiled.attend(q, k, k, masks.causal(), ties="latest", chip={name!r})
aot.compile_for(aot.CHIPS[{chip!r}], attend, x, x)
"""


def compile_in_a_child(chip: str, dump: os.PathLike[str]) -> None:
  """Leaves what the compiler of a chip says of the kernel for heads of width 2 in a folder."""
  kit.needs_compiler(chip)
  code = _COMPILE.format(name="hopper" if chip == "h200" else "tpu", chip=chip)
  environment = os.environ | aot.environment(aot.CHIPS[chip], dump)
  path = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, env=environment | path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


HULLS = ("grid", "collinear")
"""Of integers: on a CPU compilers fuse what they like, and then the trees' rounding may differ."""


def hull_tokens(ties: str, T: int) -> tuple:
  """A state with room for less than T tokens, and streams of integers: ties of every kind."""
  q, k = zip(*(planar(family, T) for family in HULLS), strict=True)
  q, k = (np.stack(x, 1)[None] for x in (q, k))
  k[:, 9] = k[:, 4]  # the same keys again
  q[:, 7], q[:, 11] = 0.0, [3.0, 0.0]
  v = np.random.default_rng(0).integers(-50, 51, (1, T, len(HULLS), 2)).astype(np.float32)
  state = hull.init_state(
    1, num_heads=2 * len(HULLS), num_kv_heads=len(HULLS), value_dim=2, max_length=T - 2, ties=ties
  )
  q = np.stack([q, -q], 3).reshape(1, T, -1, 2)
  return state, *(jnp.asarray(x) for x in (q, k, v))


def check_hull(implementation: str, ties: str, T: int, interpreted) -> None:
  """All that a hull's state holds and reads, by a chip's kernel: as the loops, bit for bit."""
  state, *tokens = hull_tokens(ties, T)
  lengths = jnp.array([T - 1], jnp.int32)
  by = lambda name: jax.jit(functools.partial(hull.prefill, implementation=name))
  expected = by("loops")(state, *tokens, lengths=lengths)
  with interpreted:
    found = by(implementation)(state, *tokens, lengths=lengths)
  trees = state.stride * state.size * state.used.shape[0]
  written = {"nodes": trees, "entries": 3 * len(HULLS) * state.capacity}  # nobody's are behind
  for name in ("used", "nodes", "entries", "extremes", "along_axes"):
    one, other = (np.asarray(getattr(x[0], name)) for x in (found, expected))
    kit.assert_same(name, one[: written.get(name)], other[: written.get(name)])
  kit.assert_same("out", found[1], expected[1])


def check_in_place(chip: str, implementation: str) -> None:
  """No array that grows with the room is copied by a step of 64 heads, where they are more than a
  chip could hold beside its processors: they grow by 150 MB or more.
  """
  needs = []
  for room in (200_000, 400_000):
    make = functools.partial(hull.init_state, 1, num_heads=64, num_kv_heads=64, value_dim=2)
    state = jax.eval_shape(functools.partial(make, max_length=room))
    x = jax.ShapeDtypeStruct((1, 4, 64, 2), jnp.float32)
    prefill = functools.partial(hull.prefill, implementation=implementation)
    program = aot.compile_for(aot.CHIPS[chip], prefill, state, x, x, x)
    needs.append(program.memory_analysis().temp_size_in_bytes)
  assert needs[1] - needs[0] < 2**20, needs
