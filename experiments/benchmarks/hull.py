"""Hard-max heads of width 2: decoding on a hull and all queries at once, against scans of all keys.

    python -m experiments.benchmark --suite=hull --check

A stream of tokens grows to each length; there hull and scan take turns, a window of tokens each. A
scan is the equation in plain XLA, the fastest form of those that we tried: one pass for the
maximum, one that sums the values that reach it, each coordinate in a row of its own. Many heads
step together in one state, which grows to the end once, on one core and, half of them each, on two.
Of all queries at once, the scan of the longest length is timed for its last queries only and
multiplied by the squares that a causal call has: it would take half an hour.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention import hull
from attention.ops import hardmax
from experiments.benchmarks import picture

K = 1024
STEP, FORWARD = "step", "forward"


class HullSuite(NamedTuple):
  """Which streams are measured, and where."""

  families: tuple[str, ...]
  lengths: tuple[int, ...]
  """Tokens before a step of one head."""
  together: tuple[str, ...]
  """The families of the heads that step together."""
  heads: int
  devices: tuple[int, ...]
  """Over how many of them, a core each."""
  bulk: tuple[int, ...]
  """Tokens of a call of all queries at once."""
  scanned: int
  """The longest of these that a scan runs whole."""
  top_k: tuple[int, ...]
  """Tokens of a call that takes the best `TOP` keys of each query."""
  rounds: int
  cores: int


HULL_SUITES: Final[Mapping[str, HullSuite]] = {
  "hull": HullSuite(
    families=("gaussian", "parabola", "circle", "parabola, shuffled"),
    lengths=(1000, 10_000, 100_000, 1_000_000),
    together=("gaussian", "parabola"),
    heads=126,
    devices=(1, 2),
    bulk=(2**12, 2**13, 2**14, 2**15, 2**16, 2**18, 2**20),
    scanned=2**16,
    top_k=(2**12, 2**13, 2**14, 2**15),
    rounds=5,
    cores=2,
  ),
  "hull-toy": HullSuite(
    families=("circle",),
    lengths=(256, 1024),
    together=("gaussian",),
    heads=4,
    devices=(1, 2),
    bulk=(2**10,),
    scanned=2**10,
    top_k=(2**8,),
    rounds=2,
    cores=0,
  ),
}
TOLERANCE = 2e-7
"""Of the score that was read, below the best one, over the greatest term of any score."""
TOP = 8
_CHECKED = 2048  # tokens of a stream whose answers are compared with a scan in float64
_SHUFFLE = 0x9E3779B1  # odd, so that multiplying by it permutes residues of powers of two


class Stream:
  """Tokens of some heads, and the hull that has read them."""

  def __init__(self, family: str, heads: int, capacity: int, devices: int = 1) -> None:
    self.family, self.heads, self.capacity = family, heads, capacity
    self.length = 0
    mesh = jax.make_mesh((devices,), ("heads",), devices=jax.devices()[:devices])
    decode = hull if devices == 1 else hull.over_heads(mesh, "heads")
    self.make = jax.jit(self._make, static_argnums=1)
    self.read = jax.jit(decode.prefill, donate_argnums=0)
    self.state = decode.init_state(
      1, num_heads=heads, num_kv_heads=heads, value_dim=2, max_length=capacity
    )

  def _make(self, start: jax.Array, count: int) -> list[jax.Array]:
    """q, k and v `1 count heads 2` of the tokens from `start` on."""
    shape = (1, count, self.heads, 2)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), start), 3)
    q, k, v = (jax.random.normal(key, shape) for key in keys)
    if self.family == "circle":
      k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    if self.family.startswith("parabola"):
      i = start.astype(jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
      size = 1 << (self.capacity - 1).bit_length()
      i = (i * jnp.uint32(_SHUFFLE)) % jnp.uint32(size) if "," in self.family else i
      x = i.astype(jnp.float32) * jnp.float32(2 / size) - 1
      k = jnp.broadcast_to(jnp.stack([2 * x, -x * x], -1)[None, :, None], shape)
    return [q, k, v]

  def window(self, count: int) -> float:
    """Reads so many tokens more: the seconds that each took."""
    tokens = jax.block_until_ready(self.make(jnp.int32(self.length), count))
    start = time.perf_counter()
    self.state, out = jax.block_until_ready(self.read(self.state, *tokens))
    del out
    self.length += count
    return (time.perf_counter() - start) / count

  def grow(self, length: int) -> None:
    """Reads up to this length, in windows of few sizes, so that few programs are compiled."""
    while self.length < length:
      self.window(1 << min(15, (length - self.length).bit_length() - 1))


def scan(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """What queries `t 2` read of keys `n 2`, one after the other. The rows are cut before: read in
  pairs, they take two to three times as long.
  """
  k_x, k_y, v_x, v_y = (x[:, i] for x in (k, v) for i in (0, 1))

  def one(q):
    s = q[0] * k_x + q[1] * k_y
    best = (s == s.max()).astype(v.dtype)
    return jnp.stack([(best * v_x).sum(), (best * v_y).sum()]) / best.sum()

  return jax.lax.map(one, q)


def measure(
  name: str, environment: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
  """Runs a suite: the rows of time and memory, and how wrong the answers were."""
  suite, rows, errors, start = HULL_SUITES[name], [], {}, time.time()
  said = lambda what: say(f"{what}: timed, {time.time() - start:.0f} s since the start")
  for family in suite.families:
    errors[f"hull, {family}"] = _regret(family)
    rows += _one_head(suite, family)
    said(f"one head, {family}")
  for family, devices in itertools.product(suite.together, suite.devices):
    rows += _together(suite, family, devices)
    said(f"{suite.heads} heads on {devices}, {family}")
  errors["bulk"] = _bulk_regret()
  times, memory = _bulk(suite)
  said("all queries at once")
  times += _top_k(suite)
  said(f"the best {TOP} keys of all queries")
  for who, error in errors.items():
    if not error <= TOLERANCE:
      raise RuntimeError(f"{who} is wrong: its regret is {error:.2g}")
  return {
    "suite": name,
    "environment": environment,
    "absent": {},
    "errors": errors,
    "times": rows + times,
    "memory": memory,
  }


def _row(
  contender: str, kind: str, T: int, seconds: Sequence[float], **more: Any
) -> dict[str, Any]:
  found = {"median": statistics.median(seconds), "min": min(seconds), "rounds": len(seconds)}
  where = {"contender": contender, "kind": kind, "T": T}
  return where | found | {"repeats": 1, "seconds": list(seconds)} | more


def _one_head(suite: HullSuite, family: str) -> list[dict[str, Any]]:
  """Rows of a token of one head after n others: by its hull, and by a scan."""
  stream, rows = Stream(family, 1, suite.lengths[-1] + 2 * K * (suite.rounds + 1)), []
  for n in suite.lengths:
    stream.grow(n)
    count = min(2 * K, n // 4)
    q, k, v = (x[0, :, 0] for x in stream.make(jnp.int32(0), n))
    scanned, few = jax.jit(scan), max(1, min(64, 10_000_000 // n))
    seconds: dict[str, list[float]] = {"hull": [], "scan": []}
    for index in range(suite.rounds + 1):
      seconds["hull"].append(stream.window(count))
      start = time.perf_counter()
      jax.block_until_ready(scanned(q[:few], k, v))
      seconds["scan"].append((time.perf_counter() - start) / few)
      if not index:  # it compiled
        seconds = {"hull": [], "scan": []}
    rows += [_row(f"{who}, {family}", STEP, n, times) for who, times in seconds.items()]
  return rows


def _together(suite: HullSuite, family: str, devices: int) -> list[dict[str, Any]]:
  """Rows of a token of many heads, after n others."""
  capacity, rows = suite.lengths[-1] + 2 * K * (suite.rounds + 1), []
  stream = Stream(family, suite.heads, capacity, devices)
  who = f"{suite.heads} hulls" + (f" on {devices} cores" if devices > 1 else "")
  for n in suite.lengths:
    stream.grow(n)
    count = min(2 * K, n // 4)
    stream.window(count)
    seconds = [stream.window(count) for _ in range(suite.rounds)]
    nodes = int(stream.state.used.max())
    rows.append(_row(f"{who}, {family}", STEP, n, seconds, nodes=nodes))
  return rows


def _bulk(suite: HullSuite) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Rows of time and memory of a causal call of one head, by divide and conquer and by tiles."""
  times, memory = [], []
  for T in suite.bulk:
    q, k, v = _planar(T)
    part = min(T, suite.scanned**2 // T)
    bulk = _compiled("bulk", True, q, k, v)
    tiled = _compiled("tiled", part == T, q[:, T - part :], k, v)
    share = 1.0 if part == T else (T + 1) / (2 * part)
    seconds: dict[str, list[float]] = {"bulk": [], "scan": []}
    for index in range(suite.rounds + 1):
      for who, program, asked in (("bulk", bulk, q), ("scan", tiled, q[:, T - part :])):
        start = time.perf_counter()
        jax.block_until_ready(program(asked, k, v))
        taken = time.perf_counter() - start
        if index:  # the first touches its memory for the first time
          seconds[who].append(taken * (share if who == "scan" else 1.0))
    times.append(_row("bulk", FORWARD, T, seconds["bulk"]))
    times.append(_row("scan", FORWARD, T, seconds["scan"], queries=part))
    needs = bulk.memory_analysis()
    assert needs is not None, "the compiler for CPUs tells what it needs"
    qkvo = 4 * T * 2 * 4
    found = {"growth": needs.temp_size_in_bytes + needs.output_size_in_bytes, "qkvo": qkvo}
    memory.append({"contender": "bulk", "kind": FORWARD, "T": T} | found)
  return times, memory


def _top_k(suite: HullSuite) -> list[dict[str, Any]]:
  """Rows of time of a causal call that takes the best keys of each query, by layers of hulls and by
  a scan. Nobody asks for the part of the softmax that they hold.
  """
  rows = []
  for T in suite.top_k:
    q, k, v = _planar(T)
    seconds: dict[str, list[float]] = {"hulls": [], "scan": []}
    attend = lambda form, *qkv: hardmax.top_k_attention(
      *qkv, top_k=TOP, is_causal=True, implementation=form
    )[0]
    programs = {form: jax.jit(functools.partial(attend, form)) for form in seconds}
    for index in range(suite.rounds + 1):
      for form, program in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(program(q, k, v))
        if index:  # the first compiles
          seconds[form].append(time.perf_counter() - start)
    rows += [_row(f"{form}, best {TOP}", FORWARD, T, times) for form, times in seconds.items()]
  return rows


def _planar(T: int) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(1), 3)
  return [jax.random.normal(key, (1, T, 1, 2)) for key in keys]


def _compiled(form: str, causal: bool, *inputs: jax.Array) -> Any:
  """A call of the op; of the last queries, to which every key is in the past, without a mask."""
  call = lambda q, k, v: hardmax.hardmax_attention(q, k, v, is_causal=causal, implementation=form)
  return jax.jit(call).lower(*inputs).compile()


def _one(x: jax.Array) -> np.ndarray:
  """The only head of the only row."""
  return np.asarray(x)[0, :, 0]


def _lost(q: np.ndarray, k: np.ndarray, read: np.ndarray) -> float:
  """By how much the keys that were read miss the best score, over the greatest term."""
  q, k = q.astype(np.float64), k.astype(np.float64)
  scores = np.where(np.tri(len(k), dtype=bool), q @ k.T, -np.inf)
  lost = scores.max(1) - scores[np.arange(len(k)), read]
  return float(lost.max() / (np.abs(q).sum(1).max() * np.abs(k).max()))


def _regret(family: str) -> float:
  """What the hull of one head loses, over tokens that say who they are."""
  q, k, _ = Stream(family, 1, _CHECKED).make(jnp.int32(0), _CHECKED)
  tokens = jnp.arange(_CHECKED, dtype=jnp.float32)[None, :, None, None]
  state = hull.init_state(
    1, num_heads=1, num_kv_heads=1, value_dim=1, max_length=_CHECKED, ties="latest"
  )
  _, out = jax.jit(hull.prefill)(state, q, k, tokens)
  return _lost(_one(q), _one(k), _one(out)[:, 0].astype(int))


def _bulk_regret() -> float:
  q, k, v = _planar(_CHECKED)
  call = lambda *qkv: hardmax.hardmax_attention(
    *qkv, is_causal=True, implementation="bulk", return_residual=True
  )
  _, winners = jax.jit(call)(q, k, v)
  return _lost(_one(q), _one(k), _one(winners.last))


COLORS: Final = {
  "gaussian": "#1f5fb4",
  "parabola": "#20803f",
  "circle": "#b8791a",
  "parabola, shuffled": "#7cb342",
  f"best {TOP}": "#a0418a",
  "scan": "#697386",
}
PANELS: Final = (
  ("hull, ", "scan, ", STEP, "one head: time of a token", "n, tokens before"),
  (" hulls", None, STEP, "many heads together: time of a token", "n, tokens before"),
  ("", "scan", FORWARD, "one head: all queries at once", "T, tokens"),
)


def draw(results: Mapping[str, Any]) -> bytes:
  """The page, as PNG bytes."""
  figure = picture.page(12, 4.4)
  axes = figure.subplots(1, 3)
  for panel, (ours, theirs, kind, title, across) in zip(axes, PANELS, strict=True):
    rows = [row for row in results["times"] if row["kind"] == kind]
    for name in dict.fromkeys(row["contender"] for row in rows):
      mine, other = ours in name, theirs is not None and name.startswith(theirs)
      if mine or other:
        points = sorted((r["T"], r["median"]) for r in rows if r["contender"] == name)
        color = next((c for end, c in COLORS.items() if name.endswith(end)), "#1f5fb4")
        style = {"linestyle": "--", "marker": "s"} if other else {"marker": "o"}
        style |= {"linestyle": ":"} if " cores" in name else {}
        panel.plot(*zip(*points, strict=True), label=name, color=color, **style)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_title(title, loc="left", color=picture.INK, fontsize=11)
    panel.set_xlabel(across, color=picture.MUTED)
    low, high = np.log10(panel.get_ylim())
    panel.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))  # whole decades, which have labels
    panel.yaxis.set_major_formatter(picture.seconds)
    panel.legend(frameon=False, fontsize=7, labelcolor=picture.INK)
    picture.quiet(panel)
  where = results["environment"]
  figure.suptitle(
    f"Hard-max heads of width 2, float32, {where['cores']} cores of {where['processor']}, jax "
    f"{where['versions']['jax']}, {where['date'][:10]}",
    color=picture.INK,
    fontsize=10,
  )
  return picture.png(figure)
