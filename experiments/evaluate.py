"""Scores a run's newest checkpoint on its whole validation split.

    python -m experiments.evaluate --workdir=runs/bytes

prints the loss in nats per scored token, and in bits, and appends the row to the run's
metrics.jsonl. Where the run keeps averaged parameters, those are scored.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments import config as configs
from experiments import flags, learning, metrics, sharding
from experiments.checkpoint import Checkpoints, like
from experiments.config import Config, MeshConfig
from experiments.data import pipeline
from experiments.data.source import Source
from experiments.flags import blame_user, knob
from experiments.model import Model, Params, make_model
from experiments.tasks import Task, make_task

Scorer = Callable[[Params, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array, jax.Array]]


class Score(NamedTuple):
  """What a model scores on a set of tokens."""

  loss: float
  """Nats per scored token."""
  accuracy: float
  """Share of scored tokens that were the likeliest."""
  tokens: float
  """Sum of the weights: scored tokens."""

  @property
  def bits(self) -> float:
    """Bits per scored token; per byte, where tokens are bytes."""
    return self.loss / math.log(2)

  def row(self) -> dict[str, float]:
    """As metrics.jsonl keeps it."""
    return {
      "loss": self.loss,
      "bits": self.bits,
      "accuracy": self.accuracy,
      "tokens": self.tokens,
    }


def make_scorer(logits: Callable[[Params, jax.Array], jax.Array]) -> Scorer:
  """(params, batch) -> sums over its tokens of (loss, right ones, weights), compiled."""

  @jax.jit
  def score(params: Params, batch: Mapping[str, jax.Array]):
    out = logits(params, batch["inputs"])
    loss, weight = learning.loss_sums(out, batch)
    right = (jnp.argmax(out, axis=-1) == batch["targets"]).astype(jnp.float32)
    return loss, (right * batch["weights"]).sum(), weight

  return score


def evaluate(
  score: Scorer,
  params: Params,
  source: Source,
  *,
  batch_size: int,
  sequences: int = 0,
  mesh: Mesh | None = None,
) -> Score:
  """The score of `params` on `source`: sums over batches, divided once; all tokens weigh the same.

  Args:
    score: see `make_scorer`.
    params: what `score` takes.
    source: records to score.
    batch_size: sequences at a time; the last batch is filled up with tokens of weight 0.
    sequences: how many to score, in whole batches: a fair sample, the same each time. 0 is all.
    mesh: devices to spread a batch over.
  """
  share = sharding.rows(mesh, batch_size)
  batches = pipeline.batches(
    source,
    batch_size=batch_size,
    seed=0,
    process_index=share.index,
    process_count=share.count,
    repeat=False,
  )
  count = math.ceil(min(sequences or len(source), len(source)) / batch_size)
  totals = [0.0, 0.0, 0.0]
  with sharding.use(mesh):
    for batch in itertools.islice(batches, count):
      sums = score(params, sharding.place(mesh, batch, share))
      totals = [total + float(part) for total, part in zip(totals, sums, strict=True)]
  loss, right, weight = totals
  return Score(loss / weight, right / weight, weight)


def eval_batch_size(config: Config) -> int:
  """Sequences scored at a time, enough for every device to have one."""
  wanted = config.evaluation.batch_size or config.batch_size
  share = config.mesh.data * config.mesh.fsdp * config.distributed.processes
  return math.ceil(wanted / share) * share


def check_data(workdir: pathlib.Path, then: str, now: str) -> None:
  """Refuses, by their sha256, other data than the run was trained on."""
  if then != now:
    raise flags.UserError(
      f"the data changed since the run in {workdir} was started (sha256 {then[:12]} then, "
      f"{now[:12]} now); give another --workdir"
    )


class Loaded(NamedTuple):
  """A finished or running run, as its workdir holds it."""

  config: Config
  task: Task
  model: Model
  step: int
  params: Params


def load(workdir: str, *, data: bool = True) -> Loaded:
  """The newest checkpoint of a run, on one device.

  Args:
    workdir: folder of the run.
    data: whether the task's records will be read, and must be those that the run was trained on.

  Raises:
    UserError: `workdir` holds no run or no checkpoint, or the data is not what it was.
  """
  folder = pathlib.Path(workdir) / "checkpoints"
  config = configs.load(workdir)
  if not folder.is_dir():
    raise flags.UserError(f"--workdir={workdir} holds no checkpoint yet")
  with Checkpoints(folder, reader=True) as checkpoints:
    # The configuration that the parameters were made with: config.json may be a later command's.
    about = checkpoints.about(checkpoints.steps[-1]) if checkpoints.steps else {}
    with blame_user():
      saved = configs.from_json(about["config"]) if "config" in about else config
      config = dataclasses.replace(saved, workdir=workdir, mesh=MeshConfig())
      task = make_task(config.task, seq_len=config.seq_len, seed=config.seed, data=config.data)
    model = make_model(config, task.vocab_size)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = like(jax.eval_shape(lambda: learning.init_state(config, model)), here)

    def check(there: Mapping[str, Any]) -> None:
      if data:
        check_data(folder.parent, there["data"], task.card.sha256)

    step, state = checkpoints.restore_newest(target, check=check)
  return Loaded(config, task, model, step, state.best_params)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The flags of this program."""

  workdir: str = knob("runs/bytes", "Folder of the run.")
  sequences: int = knob(0, "Validation sequences to score, a fair sample; 0 is all.", "[0, inf)")
  batch_size: int = knob(0, "Sequences at a time; 0 is the run's.", "[0, inf)")

  def __post_init__(self):
    flags.check_bounds(self)


def describe(task: Task, score: Score) -> str:
  """One line for people."""
  text = f"loss {score.loss:.4f} nats per token, {score.bits:.4f} bits"
  text += f", accuracy {100 * score.accuracy:.1f} %, {score.tokens:,.0f} tokens"
  if task.optimum is not None:
    text += f"; the best possible loss is {task.optimum:.4f}"
  return text


def main(argv: Sequence[str]) -> None:
  """The program."""
  options = flags.parse(argv, Options(), doc=__doc__ or "")
  run = load(options.workdir)
  batch_size = options.batch_size or eval_batch_size(run.config)
  score = evaluate(
    make_scorer(run.model),
    run.params,
    run.task.valid,
    batch_size=batch_size,
    sequences=options.sequences,
  )
  row: dict[str, Any] = {**score.row(), "split": "whole" if not options.sequences else "sample"}
  print(f"step {run.step}: {describe(run.task, score)}")
  print(json.dumps({"step": run.step, **row}), flush=True)
  with metrics.Metrics(options.workdir) as out:
    out.write("evaluation", run.step, **row)


if __name__ == "__main__":
  flags.run_main(main)
