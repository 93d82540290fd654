"""Trains a decoder on a task, with any attention mechanism.

    python -m experiments.train                     # the source of Python's standard library
    python -m experiments.train --attention=linear --optim.lr=1e-3
    python -m experiments.train --preset=mqar --attention=linear,softmax:window=16

The workdir receives metrics.jsonl, config.json, flags.txt, data_card.json, samples.jsonl,
checkpoints/ and, in the end, report.html. The same command, given again after any interruption,
goes on from the last checkpoint and arrives at the same parameters, bit for bit.
"""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import config as configs
from experiments import (
  evaluate,
  flags,
  flops,
  generate,
  learning,
  metrics,
  progress,
  report,
  safety,
  sharding,
)
from experiments.checkpoint import Checkpoints, like
from experiments.config import Config
from experiments.data import pipeline
from experiments.flags import UserError, blame_user
from experiments.learning import StepMetrics, TrainState
from experiments.model import Model, check_layers, make_model, parameter_count
from experiments.safety import Guard, Stop
from experiments.tasks import Task, make_task

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(kw_only=True)
class Run:
  """A run in progress: what it is made of, and the hands that write it down."""

  config: Config
  mesh: Mesh | None
  task: Task
  model: Model
  checkpoints: Checkpoints
  out: metrics.Metrics
  display: progress.Display
  meter: progress.Meter
  guard: Guard
  stop: Stop
  about: Mapping[str, Any]
  """What is written into every checkpoint beside the arrays."""
  flops_per_step: float

  def __post_init__(self):
    self.devices = 1 if self.mesh is None else self.mesh.size
    self.peak_flops = flops.peak(devices=self.devices)
    self.score = evaluate.make_scorer(self.model)
    self.learning_rate = learning.schedule(self.config.optim, self.config.steps)
    self.window: list[tuple[float, float]] = []
    self.grad_norm = 0.0

  @property
  def folder(self) -> pathlib.Path:
    """The workdir."""
    return pathlib.Path(self.config.workdir)

  def due(self, every: int, step: int) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every > 0 and step % every == 0


def main(argv: Sequence[str]) -> int:
  """The program."""
  config = configs.from_argv(argv, __doc__ or "")
  sharding.start(config.mesh, config.distributed)
  return train(config, Stop())


def train(config: Config, stop: Stop) -> int:
  """Runs `config` to its end, or until `stop`; returns the exit code.

  Raises:
    UserError: what was asked for cannot be done, or the loss is lost; says which and why.
  """
  first = jax.process_index() == 0
  mesh = sharding.make_mesh(config.mesh)
  with blame_user():
    task = make_task(config.task, seq_len=config.seq_len, seed=config.seed, data=config.data)
    pipeline.batches(task.train, batch_size=config.batch_size, seed=config.seed)  # checks sizes
    (folder := pathlib.Path(config.workdir)).mkdir(parents=True, exist_ok=True)
  check_layers(config, task.vocab_size, len(task.prompt))
  with sharding.use(mesh):
    model = make_model(config, task.vocab_size)
  about = {
    "config": configs.to_json(config),
    "data": task.card.sha256,
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
  }
  with (
    safety.alone_in(folder),
    Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
    progress.Display(config.steps, active=first) as display,
  ):
    step, state = start(config, mesh, model, checkpoints, about, display)
    if first:
      with blame_user():
        metrics.rewind(folder, step, tell=display.tell)
        configs.save(config)
        (folder / "data_card.json").write_text(task.card.to_json())
    with metrics.Metrics(folder, tensorboard=config.log.tensorboard, active=first) as out:
      run = Run(
        config=config,
        mesh=mesh,
        task=task,
        model=model,
        checkpoints=checkpoints,
        out=out,
        display=display,
        meter=progress.Meter(),
        guard=Guard(config.guard),
        stop=stop,
        about=about,
        flops_per_step=flops.train_step(model.config, config.batch_size, config.seq_len),
      )
      announce(run, step, state)
      return work(run, step, state)


def start(
  config: Config,
  mesh: Mesh | None,
  model: Model,
  checkpoints: Checkpoints,
  about: Mapping[str, Any],
  display: progress.Display,
) -> tuple[int, TrainState]:
  """The state to begin with: of the newest checkpoint, or a fresh one."""
  with sharding.use(mesh), blame_user((ValueError, NotImplementedError)):
    state = learning.init_state(config, model)
  if not checkpoints.steps:
    if set_aside := list(checkpoints.folder.glob("*.damaged")):
      raise UserError(
        f"{checkpoints.folder} holds only damaged checkpoints, such as {set_aside[0].name}; "
        "give another --workdir to start again"
      )
    return 0, state
  target = like(state)
  del state  # a large model does not fit twice

  def check(there: Mapping[str, Any]) -> None:
    compare(config, there, about, checkpoints.folder, display)

  step, state = checkpoints.restore_newest(target, check=check, tell=display.tell, set_aside=True)
  return step, state


def compare(
  config: Config,
  there: Mapping[str, Any],
  here: Mapping[str, Any],
  folder: pathlib.Path,
  display: progress.Display,
) -> None:
  """Says how this run differs from the checkpoint's; refuses if its steps mean something else."""
  with blame_user():
    old = configs.from_json(there["config"])
  harmless, harmful = configs.differences(old, config)
  if harmful:
    raise UserError(
      f"the run in {folder.parent} was started otherwise: this command has {', '.join(harmful)}; "
      "repeat what it was, or give another --workdir"
    )
  evaluate.check_data(folder.parent, there["data"], here["data"])
  if harmless:
    display.tell(f"resuming with other settings than the checkpoint's: {', '.join(harmless)}")
  changed = [
    f"{k} {v} (was {there['versions'].get(k)})"
    for k, v in here["versions"].items()
    if v != there["versions"].get(k)
  ]
  if changed:
    display.tell(f"resuming with other versions, so not bit for bit: {', '.join(changed)}")


def announce(run: Run, step: int, state: TrainState) -> None:
  """Writes the first row: what runs where; and tells it."""
  config, device = run.config, jax.devices()[0]
  parameters = parameter_count(state.params)
  run.display.tell(
    f"{flags.summary(config)}\n{parameters:,} parameters, {run.task.vocab_size} kinds of token, "
    f"{run.devices} x {device.device_kind}, workdir {config.workdir}"
  )
  if step:
    run.display.tell(f"resumed from step {step}")
  run.out.write(
    "start",
    step,
    resumed_from=step or None,
    parameters=parameters,
    flops_per_step=run.flops_per_step,
    peak_flops=run.peak_flops,
    device=device.device_kind,
    platform=device.platform,
    devices=run.devices,
    processes=jax.process_count(),
    python=platform.python_version(),
    versions=run.about["versions"],
    bits=run.task.bits,
    optimum=run.task.optimum,
    baselines=dict(run.task.baselines) if jax.process_index() == 0 else {},
  )


def batches(run: Run, step: int) -> Iterator[dict[str, jax.Array]]:
  """The global batches from `step` on: a pure function of the seed and the step, on any mesh."""
  share = sharding.rows(run.mesh, run.config.batch_size)
  local = pipeline.batches(
    run.task.train,
    batch_size=run.config.batch_size,
    seed=run.config.seed,
    start_step=step,
    process_index=share.index,
    process_count=share.count,
  )
  return (sharding.place(run.mesh, batch, share) for batch in local)


def work(run: Run, step: int, state: TrainState) -> int:
  """The loop. A step's numbers are read while the next computes, and before its state is kept."""
  config, first_step = run.config, step
  if step >= config.steps:
    run.display.tell(
      f"the run in {config.workdir} has done {step} of --steps={config.steps} already"
    )
    return finish(run, step, state)
  train_step, data = learning.make_step(config, run.model), batches(run, step)
  unread: tuple[int, StepMetrics] | None = None
  while step < config.steps and not run.stop.asked(step):
    with sharding.use(run.mesh):
      state, measured = train_step(state, next(data))
    if unread:
      judge(run, *unread)
    step, unread = step + 1, (step + 1, measured)
    if step == first_step + 1 or step == config.steps or is_due(config, step):
      judge(run, *unread)
      unread = None
      if step == first_step + 1:
        run.meter.start(step)  # everything is compiled
      observe(run, step, state)
  if unread:
    judge(run, *unread)
  if run.window:
    log(run, step)  # of the steps since the last row, which a resumed run does not repeat
  run.checkpoints.save(step, state, dict(run.about))
  if step < config.steps:
    run.checkpoints.wait()
    run.out.write("event", step, message="stopped by a signal; the state is saved", level="info")
    run.display.tell(f"stopped: step {step} is saved, and the same command goes on from there")
    return run.stop.exit_code
  return finish(run, step, state)


def is_due(config: Config, step: int) -> bool:
  """Whether anything is to be done after this step."""
  intervals = (
    config.log.every,
    config.evaluation.every,
    config.log.sample_every,
    config.checkpoint.every,
  )
  return any(every > 0 and step % every == 0 for every in intervals)


def judge(run: Run, step: int, measured: StepMetrics) -> None:
  """Reads what a step measured; raises if the run has gone wrong."""
  loss_sum, weight, grad_norm = (float(value) for value in jax.device_get(measured))
  loss = loss_sum / max(weight, 1.0)
  run.window.append((loss_sum, weight))
  run.grad_norm = grad_norm
  if (wrong := run.guard.verdict(loss, grad_norm)) is None:
    return
  # The loss of step s was measured on the state after s - 1 steps.
  good = [saved for saved in run.checkpoints.steps if saved < step - 1]
  B, seed = run.config.batch_size, run.config.seed
  text = (
    f"stopped at step {step}: {wrong}; its batch is number {step - 1} of seed {seed}, records "
    f"{(step - 1) * B} to {step * B - 1} of the shuffled data; "
    + (f"the last good checkpoint is of step {good[-1]}" if good else "there is no good checkpoint")
    + f" in {run.checkpoints.folder}"
  )
  run.out.write("event", step, message=text, level="error", stopped=True)
  raise UserError(text)


def observe(run: Run, step: int, state: TrainState) -> None:
  """Logs, validates, samples and saves, as far as each is due."""
  config = run.config
  if run.due(config.log.every, step) or step == config.steps:
    log(run, step)
  if step == config.steps:
    return  # the rest is done by `finish`
  with run.meter.pause():
    if run.due(config.evaluation.every, step):
      validate(run, step, state, config.evaluation.sequences)
    if run.due(config.log.sample_every, step):
      write_sample(run, step, state)
  if run.due(config.checkpoint.every, step):
    run.checkpoints.save(step, state, dict(run.about))


def log(run: Run, step: int) -> None:
  """One row of training: the mean loss since the last row, and the rate."""
  seconds = run.meter.lap(step)
  loss = sum(s for s, _ in run.window) / max(sum(w for _, w in run.window), 1.0)
  run.window.clear()
  tokens, peak = run.config.batch_size * run.config.seq_len, run.peak_flops
  row = {
    "loss": loss,
    "bits": loss / math.log(2),
    "lr": float(np.asarray(run.learning_rate(step - 1))),
    "grad_norm": run.grad_norm,
    "tokens_per_second": tokens / seconds if seconds else None,
    "mfu": run.flops_per_step / seconds / peak if seconds and peak else None,
    "memory_bytes": progress.peak_memory(),
    "seconds_left": run.meter.seconds_left(step, run.config.steps),
  }
  run.out.write("train", step, **row)
  run.display.update(step, row)


def validate(run: Run, step: int, state: TrainState, sequences: int, **more: Any) -> None:
  """Scores the state on a fair sample of the validation split."""
  score = evaluate.evaluate(
    run.score,
    state.best_params,
    run.task.valid,
    batch_size=evaluate.eval_batch_size(run.config),
    sequences=sequences,
    mesh=run.mesh,
  )
  run.out.write("valid", step, **score.row(), **more)
  run.display.tell(f"step {step} validation: {evaluate.describe(run.task, score)}")


def write_sample(run: Run, step: int, state: TrainState) -> None:
  """Lets the model write; process 0 does it alone, on one device."""
  params = state.best_params if run.mesh is None else sharding.gather(state.best_params)
  if jax.process_index() != 0:
    return
  prompt = list(run.task.prompt)
  key = jax.random.fold_in(jax.random.key(run.config.seed), np.uint32(step))
  tokens = generate.generate(
    run.model, params, [prompt], tokens=run.config.log.sample_tokens, key=key
  )
  start, text = run.task.decode(prompt), run.task.decode(prompt + tokens[0].tolist())
  run.out.write("sample", step, text=text, prompt=start)
  with blame_user(), open(run.folder / metrics.SAMPLES, "a", encoding="utf-8") as file:
    file.write(json.dumps({"step": step, "prompt": start, "text": text}) + "\n")
  run.display.tell(f"step {step} sample:\n{generate.printable(text).strip(chr(10))}\n")


def finish(run: Run, step: int, state: TrainState) -> int:
  """Validates, samples and reports, unless that was done before."""
  rows = metrics.read(run.folder)
  if not any(row["kind"] == "valid" and row["step"] == step and row.get("final") for row in rows):
    validate(run, step, state, run.config.evaluation.final_sequences, final=True)
    if run.config.log.sample_every:
      write_sample(run, step, state)
  run.checkpoints.wait()
  if jax.process_index() == 0:
    with blame_user((OSError,), "the run is done and saved, and its report was not written: "):
      page = report.write(run.config.workdir)
    for name, bits in run.task.baselines.items():
      run.display.tell(f"{name:>10}: {bits:.3f} bits")
    run.display.tell(f"report: {page}")
  return 0


if __name__ == "__main__":
  flags.run_main(main)
