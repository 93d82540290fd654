"""Recall against the size of the state: multi-query associative recall, mechanism by mechanism.

    python -m experiments.mqar
    python -m experiments.mqar --mechanisms=window,attention --steps=200

A sequence of 32 tokens tells 8 pairs of key and value and then asks for each once (see
`experiments.tasks.recall`); in training a third of them tell half as many, a third a quarter. Two
layers have to answer with what their state can hold, and its size is varied: by the window of a
window, by the head width of all others. Each point is trained with three seeds at once, in one
compiled program, until all of them answer 99.9 % or the steps end.

Writes experiments/results/mqar.json after each point, so that what is finished is not run again and
a killed sweep goes on, and draws experiments/results/mqar.png. The sizes are `Variant.cost`'s, of
one sequence, over both layers, without the short convolutions that all of them have alike.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from attention import variants
from experiments import figures, files, flags, learning, provenance
from experiments.config import PRESETS, Config
from experiments.data.source import Record
from experiments.flags import UserError, knob
from experiments.model import Model, decoder_config, make_model
from experiments.tasks import Task, make_task

Records = dict[str, jax.Array]
RESULTS = pathlib.Path(__file__).parent / "results"
SEEDS = 3
SOLVED = 0.999
CHUNK = 100
"""Steps of one call, after which the seeds are validated."""
EQUAL = 2500
"""Bytes of state near which every mechanism has a point."""
TRAIN, VALID = 15000, 256
"""Records."""
SHARES = (1, 2, 4)
"""By what the number of pairs is divided in training: fewer are learned sooner, and help."""


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """A line of the picture."""

  pattern: str
  """Of both layers; {window} is the point's."""
  color: str
  head_dims: tuple[int, ...]
  windows: tuple[int, ...] = (0,)


MECHANISMS: Final[Mapping[str, Mechanism]] = {
  "attention": Mechanism("softmax", "#1d2430", (4, 8, 16)),
  "Based": Mechanism("taylor", "#1f5fb4", (4, 6, 8, 12)),
  "GLA": Mechanism("gated_linear", "#20803f", (16, 24, 32, 48)),
  "Mamba-2": Mechanism("mamba2", "#c05a00", (4, 6, 8, 16)),
  "window": Mechanism("softmax:window={window}", "#a0307f", (16,), (4, 8, 16)),
}
"""Name -> mechanism, in the order that the field has found, best first."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The command line."""

  mechanisms: str = knob("all", f"With commas: {', '.join(MECHANISMS)}.")
  steps: int = knob(2000, "Steps of a run at the most.", "[1, inf)")
  batch_size: int = knob(32, "Sequences per step.", "[1, inf)")
  width: int = knob(32, "Width of the residual stream, and of the MLP.", "[1, inf)")
  seq_len: int = knob(32, "Tokens of a sequence, four or more for each pair.", "[4, inf)")
  pairs: int = knob(8, "Pairs of key and value.", "[1, inf)")
  vocab_size: int = knob(32, "Keys and values together.", "[4, inf)")
  lr: float = knob(1e-2, "Peak learning rate.", "(0, inf)")
  points: int = knob(0, "Smallest sizes of each mechanism; 0 is all.", "[0, inf)")
  out: str = knob("", "Results, JSON, the picture beside it; empty is experiments/results.")


@dataclasses.dataclass(frozen=True)
class Point:
  """A mechanism with a state of one size."""

  mechanism: str
  head_dim: int
  window: int
  config: Config

  @property
  def state_bytes(self) -> int:
    """What decoding keeps of one whole sequence, over all layers."""
    shape, T = decoder_config(self.config, 2), self.config.seq_len
    layers = variants.parse(shape.pattern)
    total = 0.0
    for i in range(shape.num_layers):
      layer = layers[i % len(layers)]
      heads = layer.variant.mixer.heads(shape)
      sizes = (heads.out, heads.k, heads.key_dim, heads.value_dim)
      total += layer.cost(1, T, T, *sizes).state_bytes
    return round(total)

  @property
  def identity(self) -> dict[str, Any]:
    """What decides the result."""
    config = self.config
    return {
      "mechanism": self.mechanism,
      "pattern": config.attention,
      "head_dim": self.head_dim,
      "state_bytes": self.state_bytes,
      "task": config.task,
      "seq_len": config.seq_len,
      "width": config.model.width,
      "batch_size": config.batch_size,
      "lr": config.optim.lr,
      "steps": config.steps,
    }


def plan(options: Options) -> list[Point]:
  """Every point of the sweep, those near to EQUAL bytes first: a sweep cut short compares them."""
  names = options.mechanisms.split(",") if options.mechanisms != "all" else list(MECHANISMS)
  points = []
  for name in names:
    if name not in MECHANISMS:
      raise UserError(flags.unknown("--mechanisms", name, MECHANISMS))
    one = MECHANISMS[name]
    sizes = [(H, W) for H in one.head_dims for W in one.windows]
    for head_dim, window in sizes[: options.points or None]:
      points.append(Point(name, head_dim, window, _config(options, one, head_dim, window)))
  return sorted(points, key=lambda point: abs(math.log(point.state_bytes / EQUAL)))


def _config(options: Options, one: Mechanism, head_dim: int, window: int) -> Config:
  """The preset mqar, smaller."""
  changes = {
    "task": f"recall:pairs={options.pairs}:vocab_size={options.vocab_size}",
    "attention": one.pattern.format(window=window),
    "steps": options.steps,
    "batch_size": options.batch_size,
    "seq_len": options.seq_len,
    "model.width": options.width,
    "model.mlp_width": options.width,
    "model.head_dim": head_dim,
    "optim.lr": options.lr,
  }
  return flags.replace(Config(), {**PRESETS["mqar"], **changes})


def _task(config: Config, text: str = "") -> Task:
  """The config's own, or that of `text`; refuses more pairs than the tokens hold."""
  return make_task(text or config.task, seq_len=config.seq_len, seed=0, data=config.data)


def load_data(config: Config) -> tuple[Records, Records, int]:
  """(training records, validation records, vocabulary), whole: they are small.

  A third each of the training records has all pairs, half of them and a quarter of them, and every
  record weighs the same.
  """

  def take(source: Any, count: int) -> list[Record]:
    records = [source[i] for i in range(count)]
    return [r | {"weights": r["weights"] / r["weights"].sum()} for r in records]

  def stack(records: Sequence[Record]) -> Records:
    return {name: jnp.asarray(np.stack([r[name] for r in records])) for name in records[0]}

  task = _task(config)
  base, pairs, *rest = config.task.split(":")
  count = int(pairs.removeprefix("pairs="))
  fewer = [":".join((base, f"pairs={max(1, count // n)}", *rest)) for n in SHARES]
  train = [
    record for name in fewer for record in take(_task(config, name).train, TRAIN // len(SHARES))
  ]
  return stack(train), stack(take(task.valid, VALID)), task.vocab_size


def programs(config: Config, model: Model) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """What is compiled, for all seeds side by side.

  Returns:
    keys -> states; and (count, states, keys, train, valid) -> (states, losses, accuracies), `count`
    steps later.
  """
  optimizer = learning.make_optimizer(config.optim, config.steps)
  step = learning.make_step(config, model)

  def init(key: jax.Array) -> learning.TrainState:
    params = model.init(key)
    return learning.TrainState(jnp.int32(0), params, optimizer.init(params), None)

  def some_steps(
    count: int, state: learning.TrainState, key: jax.Array, train: Records, valid: Records
  ):
    def one_step(state: learning.TrainState, _: None):
      draw = jax.random.fold_in(key, state.step)
      rows = jax.random.randint(draw, (config.batch_size,), 0, train["inputs"].shape[0], jnp.int32)
      state, metrics = step(state, {name: x[rows] for name, x in train.items()})
      return state, metrics.loss_sum / metrics.weight

    state, losses = jax.lax.scan(one_step, state, None, length=count)
    return state, losses[-1], accuracy(model, state.params, valid)

  @functools.partial(jax.jit, static_argnums=0)
  def side_by_side(count: int, *arguments: Any):
    run = functools.partial(some_steps, count)
    return jax.vmap(run, in_axes=(0, 0, None, None))(*arguments)

  return jax.jit(jax.vmap(init)), side_by_side


def run(point: Point) -> dict[str, Any]:
  """Trains the seeds of one point side by side; its row."""
  start = time.perf_counter()
  train, valid, vocab_size = load_data(point.config)
  init, some_steps = programs(point.config, make_model(point.config, vocab_size))
  keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
  states, step, right, curve = init(keys), 0, [0.0], []
  while step < point.config.steps and min(right) < SOLVED:
    count = min(CHUNK, point.config.steps - step)
    states, losses, accuracies = some_steps(count, states, keys, train, valid)
    step, right = int(states.step[0]), [round(float(x), 5) for x in accuracies]
    curve.append({"step": step, "loss": [round(float(x), 4) for x in losses], "accuracy": right})
    seen = f"{point.mechanism}, {point.state_bytes} bytes, step {step}: {right}"
    print(seen, file=sys.stderr, flush=True)
  seconds = round(time.perf_counter() - start, 1)
  return {**point.identity, "accuracy": right, "seconds": seconds, "curve": curve}


def accuracy(
  model: Callable[[Any, jax.Array], jax.Array], params: Any, batch: Mapping[str, jax.Array]
) -> jax.Array:
  """The share of questions whose likeliest answer is right; `model` makes logits of tokens."""
  answers = model(params, batch["inputs"]).argmax(-1)
  right = jnp.where(answers == batch["targets"], batch["weights"], 0.0)
  return right.sum() / batch["weights"].sum()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows that are finished.

  Raises:
    UserError: the file is not one that `write` wrote.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"--out={path} cannot be read: {error}") from error


def write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Puts the rows in place of the file whole, so that a kill leaves the old or the new."""
  environment = provenance.environment(("jax", "jaxlib", "flax", "optax", "numpy"))
  files.write_results(path, {"environment": environment, "rows": rows})


def picture(rows: Iterable[Mapping[str, Any]]) -> Figure:
  """Accuracy against bytes of state: the seeds' mean, and between their worst and best a band."""
  theme = figures.LIGHT
  figure = Figure(figsize=(6.4, 3.9), facecolor=theme.surface, layout="constrained")
  axes = figure.add_subplot()
  for name, one in MECHANISMS.items():
    mine = sorted((r for r in rows if r["mechanism"] == name), key=lambda r: r["state_bytes"])
    if not mine:
      continue
    size = [r["state_bytes"] for r in mine]
    seeds = np.array([r["accuracy"] for r in mine])
    axes.fill_between(size, seeds.min(1), seeds.max(1), color=one.color, alpha=0.15, linewidth=0)
    axes.plot(size, seeds.mean(1), color=one.color, marker="o", markersize=4, label=name)
  axes.set_xscale("log", base=2)
  axes.set_ylim(-0.02, 1.04)
  axes.xaxis.set_major_formatter(lambda value, _: figures.number(value))
  axes.set_xlabel("state of one sequence, bytes", color=theme.muted)
  axes.set_title("Answers that are right", loc="left", color=theme.ink, fontsize=10)
  axes.grid(color=theme.grid)
  axes.set_axisbelow(True)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.tick_params(colors=theme.muted, length=0)
  axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink)
  return figure


def table(rows: Iterable[Mapping[str, Any]]) -> str:
  """A line for each point."""
  lines = [f"{'mechanism':<11}{'bytes':>8}  {'mean':>5}  {'min':>5}  {'max':>5}  steps"]
  for r in rows:
    seeds = r["accuracy"]
    numbers = (sum(seeds) / len(seeds), min(seeds), max(seeds))
    text = "  ".join(f"{x:.3f}" for x in numbers)
    lines.append(f"{r['mechanism']:<11}{r['state_bytes']:>8}  {text}  {r['curve'][-1]['step']}")
  return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
  """Runs what is not finished, writes, draws, prints."""
  options = flags.parse(argv, Options(), doc=__doc__ or "")
  with flags.blame_user():
    flags.check_bounds(options)
    points = plan(options)
    _task(points[0].config)
  path = pathlib.Path(options.out or RESULTS / "mqar.json")
  provenance.prepare(path)
  jax.config.update("jax_platforms", "cpu")
  rows = read(path)
  identities = {json.dumps(point.identity): point for point in points}
  finished = {json.dumps({name: row[name] for name in points[0].identity}) for row in rows}
  for identity, point in identities.items():
    if identity in finished:
      continue
    rows.append(run(point))
    write(path, rows)
  path.with_suffix(".png").write_bytes(figures.png(picture(rows)))
  print(table(rows))
  return 0


if __name__ == "__main__":
  flags.run_main(main)
