"""Learned soft, run hard: heads of width 2 whose softmax is cooled until it looks at one place.

    python -m experiments.hardened
    python -m experiments.hardened --seeds=1 --hardness=8

Two layers learn to recall (see `experiments.tasks.recall`: 8 pairs of key and value, then each key
once) with attention of heads of width 2, in three parts: softmax; softmax that cools, its inverse
temperature, a factor of the queries, growing geometrically to `--hardness`; and hard-max attention
with the cooled softmax's gradient for queries and keys (straight through). What has been learned is
then run three ways, with the same weights: with the cooled softmax, with hard-max attention, and
token by token with the hull's cache, which finds a key in logarithmic time.

All of it is done for each of `--seeds` first weights and orders of the data, one after the other.
Writes experiments/results/hardened.json and draws experiments/results/hardened.png: right answers
against the step, soft and hard.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from matplotlib.figure import Figure

from attention import annealing, hull
from attention.modules.decoder import Decoder
from attention.ops import hardmax
from attention.variants import Layer, make_layer
from experiments import figures, files, flags, learning, mqar, provenance
from experiments.config import PRESETS, Config
from experiments.flags import knob
from experiments.model import Model, decoder_config

Records = dict[str, jax.Array]
RESULTS = pathlib.Path(__file__).parent / "results" / "hardened.json"
COLORS: Final[Mapping[str, str]] = {"soft": "#c05a00", "hard": "#1f5fb4"}
COOLING, HARD = 0.2, 0.4
"""The shares of the steps after which the second and the third part begin."""
ALLOWED = 0.01
"""By how much the hard answers may be worse."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The command line."""

  steps: int = knob(3000, "Training steps.", "[3, inf)")
  hardness: float = knob(16.0, "Inverse temperature when cooled.", "[1, inf)")
  heads: int = knob(16, "Heads of a layer, each of width 2.", "[1, inf)")
  width: int = knob(32, "Width of the residual stream, and of the MLP.", "[1, inf)")
  batch_size: int = knob(32, "Sequences per step.", "[1, inf)")
  seq_len: int = knob(32, "Tokens of a sequence, four or more for each pair.", "[4, inf)")
  pairs: int = knob(8, "Pairs of key and value.", "[1, inf)")
  vocab_size: int = knob(32, "Keys and values together.", "[4, inf)")
  lr: float = knob(1e-2, "Peak learning rate.", "(0, inf)")
  seed: int = knob(0, "Selects the first weights and the order of the data.", "[0, inf)")
  seeds: int = knob(3, "How many runs, from --seed on.", "[1, inf)")
  out: str = knob("", "Results, JSON, the picture beside it; empty is experiments/results.")


@dataclasses.dataclass(frozen=True)
class Soft(Layer):
  """Softmax attention that knows no positions: in a plane there is no room for them."""

  __hash__ = Layer.__hash__

  @property
  def rotary(self) -> bool:
    """Never."""
    return False


@dataclasses.dataclass(frozen=True)
class Through(Layer):
  """Hard-max attention with the gradient of `Soft` for queries and keys."""

  __hash__ = Layer.__hash__

  def attend(self, q: Any, k: Any, v: Any, *, segment_ids: Any = None, **inputs: Any) -> jax.Array:
    """Of one document."""
    if segment_ids is not None:
      raise NotImplementedError("sequences of several documents have no straight-through form")
    return hardmax.hardmax_attention(q, k, v, is_causal=True, straight_through=2**0.5, **inputs)


@dataclasses.dataclass(frozen=True)
class Hull(Layer):
  """Hard-max attention whose cache is a hull."""

  __hash__ = Layer.__hash__

  def init_state(self, batch: int, **sizes: Any) -> hull.HullState:
    """The state of no token."""
    return hull.init_state(batch, **sizes)

  def prefill(self, state: Any, q: Any, k: Any, v: Any, **inputs: Any) -> Any:
    """Appends many tokens."""
    return hull.prefill(state, q, k, v, **inputs)

  def step(self, state: Any, q: Any, k: Any, v: Any, **inputs: Any) -> Any:
    """Appends one token."""
    return hull.step(state, q, k, v, **inputs)


def _same(kind: type[Layer], name: str) -> Layer:
  layer = make_layer(name)
  return kind(layer.name, layer.options)


LAYERS: Final[Mapping[str, Layer]] = {
  "soft": _same(Soft, "softmax"),
  "through": _same(Through, "hardmax"),
  "hard": make_layer("hardmax"),
  "hull": _same(Hull, "hardmax"),
}
"""What both layers are; the parameters fit all of them."""


def make_config(options: Options) -> Config:
  """The preset mqar with heads of width 2."""
  changes = {
    "task": f"recall:pairs={options.pairs}:vocab_size={options.vocab_size}",
    "steps": options.steps,
    "batch_size": options.batch_size,
    "seq_len": options.seq_len,
    "seed": options.seed,
    "model.width": options.width,
    "model.mlp_width": options.width,
    "model.num_heads": options.heads,
    "model.head_dim": 2,
    "optim.lr": options.lr,
  }
  return flags.replace(Config(), {**PRESETS["mqar"], **changes})


def make_model(config: Config, vocab_size: int, layer: Layer) -> Model:
  """A decoder with this layer throughout."""
  shape = decoder_config(config, vocab_size)

  def build(key: jax.Array) -> Decoder:
    return Decoder(shape, (layer,), rngs=nnx.Rngs(params=key))

  graph, _ = nnx.split(nnx.eval_shape(build, jax.random.key(0)))
  return Model(shape, graph, lambda key: nnx.to_pure_dict(nnx.state(build(key))))


def hardness(step: jax.Array, options: Options) -> jax.Array:
  """The inverse temperature at a step: 1, then growing, then `--hardness`."""
  first, last = COOLING * options.steps, HARD * options.steps
  cooled = (step.astype(jnp.float32) - first) / (last - first)
  return annealing.harden(cooled, 1, end=options.hardness)


def sharpened(params: Any, factor: jax.Array | float) -> Any:
  """The parameters with all queries multiplied."""

  def times(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    return leaf * factor if any(getattr(key, "key", "") == "query" for key in path) else leaf

  return jax.tree_util.tree_map_with_path(times, params)


def calls(steps: int) -> list[tuple[str, int, int]]:
  """Which model trains from which step to which: `mqar.CHUNK` of them, and fewer where the last
  part begins or the steps end.
  """
  last = math.ceil(HARD * steps)
  ends = sorted({*range(0, steps, mqar.CHUNK), last, steps})
  return [
    ("soft" if done < last else "through", done, end) for done, end in itertools.pairwise(ends)
  ]


def train(
  config: Config, options: Options, models: Mapping[str, Model], data: tuple[Records, Records]
) -> tuple[Any, list[dict[str, float]]]:
  """The sharpened parameters, and for each call the step, the hardness and right answers."""
  optimizer = learning.make_optimizer(config.optim, config.steps)
  train_data, valid = data
  count = train_data["inputs"].shape[0]

  def step(name: str, carry: Any, index: jax.Array) -> tuple[Any, None]:
    params, opt_state = carry
    draw = jax.random.fold_in(jax.random.key(config.seed), index)
    rows = jax.random.randint(draw, (config.batch_size,), 0, count, jnp.int32)
    batch = {name: x[rows] for name, x in train_data.items()}

    def loss(params: Any) -> jax.Array:
      logits = models[name](sharpened(params, hardness(index, options)), batch["inputs"])
      total, weight = learning.loss_sums(logits, batch)
      return total / weight

    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
      updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def some_steps(
    name: str, size: int, carry: Any, first: jax.Array
  ) -> tuple[Any, dict[str, jax.Array]]:
    indices = first + jnp.arange(size, dtype=jnp.int32)
    carry, _ = jax.lax.scan(functools.partial(step, name), carry, indices)
    factor = hardness(first + size, options)
    ready = sharpened(carry[0], factor)
    right = {name: mqar.accuracy(models[name], ready, valid) for name in ("soft", "hard")}
    return carry, {"hardness": factor, **right}

  params = jax.jit(models["soft"].init)(jax.random.key(config.seed))
  carry, curve = (params, optimizer.init(params)), []
  for name, done, end in calls(config.steps):
    carry, seen = some_steps(name, end - done, carry, jnp.int32(done))
    curve.append({"step": end, **{key: round(float(x), 5) for key, x in seen.items()}})
    print(", ".join(f"{key} {x:g}" for key, x in curve[-1].items()), file=sys.stderr, flush=True)
  return sharpened(carry[0], curve[-1]["hardness"]), curve


def decoded(model: Model) -> Callable[[Any, jax.Array], jax.Array]:
  """(params, tokens [B T]) -> logits [B T V], one token after another."""

  def run(params: Any, tokens: jax.Array) -> jax.Array:
    decoder = model.bind(params)
    state = decoder.init_state(*tokens.shape)
    _, logits = jax.lax.scan(decoder.step, state, tokens.T)
    return logits.swapaxes(0, 1)

  return jax.jit(run)


def picture(runs: Sequence[Mapping[str, Any]]) -> Figure:
  """Right answers of every run against the step, and where they began to cool."""
  theme = figures.LIGHT
  figure = Figure(figsize=(6.4, 3.9), facecolor=theme.surface, layout="constrained")
  axes = figure.add_subplot()
  steps = [row["step"] for row in runs[0]["curve"]]
  for (name, color), (index, run) in itertools.product(COLORS.items(), enumerate(runs)):
    right = [row[name] for row in run["curve"]]
    axes.plot(steps, right, color=color, label="_" if index else name, linewidth=1)
  for share, text in ((COOLING, "cools"), (HARD, "hard, straight through")):
    at = share * steps[-1]
    axes.axvline(at, color=theme.muted, linewidth=1, dashes=(5, 3))
    axes.annotate(f" {text}", (at, 0.02), color=theme.muted, fontsize=9)
  axes.set_ylim(-0.02, 1.04)
  axes.set_xlabel("step", color=theme.muted)
  axes.set_title("Answers that are right", loc="left", color=theme.ink, fontsize=10)
  axes.grid(color=theme.grid)
  axes.set_axisbelow(True)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.tick_params(colors=theme.muted, length=0)
  axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink, loc="center right")
  return figure


def run(options: Options, config: Config, data: tuple[Records, Records, int]) -> dict[str, Any]:
  """One seed: right answers at the end, with each layer, and on the way."""
  train_data, valid, vocab_size = data
  models = {name: make_model(config, vocab_size, layer) for name, layer in LAYERS.items()}
  params, curve = train(config, options, models, (train_data, valid))
  right = {name: curve[-1][name] for name in ("soft", "hard")}
  right["hull"] = float(mqar.accuracy(decoded(models["hull"]), params, valid))
  return {
    "seed": config.seed,
    "accuracy": {name: round(x, 5) for name, x in right.items()},
    "curve": curve,
  }


def main(argv: Sequence[str]) -> int:
  """Trains, hardens, decodes, writes, draws. 1 if a run's hard answers are worse by more than
  ALLOWED.
  """
  options = flags.parse(argv, Options(), doc=__doc__ or "")
  with flags.blame_user():
    flags.check_bounds(options)
  path, start, runs = pathlib.Path(options.out or RESULTS), time.perf_counter(), []
  provenance.prepare(path)
  jax.config.update("jax_platforms", "cpu")
  for seed in range(options.seed, options.seed + options.seeds):
    with flags.blame_user():
      config = make_config(dataclasses.replace(options, seed=seed))
      data = mqar.load_data(config)
    runs.append(run(options, config, data))
    right = (f"{name} {100 * x:.2f} %" for name, x in runs[-1]["accuracy"].items())
    print(f"seed {seed}: right answers " + ", ".join(right), flush=True)
  results = {
    "environment": provenance.environment(("jax", "jaxlib", "flax", "optax", "numpy")),
    "options": {name: x for name, x in flags.to_json(options).items() if name != "out"},
    "seconds": round(time.perf_counter() - start, 1),
    "runs": runs,
  }
  files.write_results(path, results)
  path.with_suffix(".png").write_bytes(figures.png(picture(runs)))
  all_right = [one["accuracy"] for one in runs]
  return int(any(min(x["hard"], x["hull"]) < x["soft"] - ALLOWED for x in all_right))


if __name__ == "__main__":
  flags.run_main(main)
