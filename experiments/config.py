"""A run, whole, as a tree of frozen dataclasses.

Each field is a flag (`--optim.lr=3e-4`), typed, with its help text. Fields marked `free` may differ
when a run is resumed; all others are part of what the run means (see `differences`).
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments import flags
from experiments.flags import UserError, knob


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
  """Where text comes from; generated tasks need none of it."""

  path: str = knob(
    "", "Text files to learn, as a glob; empty is the source of Python's standard library."
  )
  valid_fraction: float = knob(
    0.1, "Share of the files (of the bytes, for a single file) kept for validation.", "(0, 1)"
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
  """The decoder's shape and arithmetic."""

  num_layers: int = knob(4, "Blocks.", "[1, inf)")
  width: int = knob(192, "Width of the residual stream.", "[1, inf)")
  num_heads: int = knob(4, "Query heads.", "[1, inf)")
  num_kv_heads: int = knob(
    0, "Key/value heads, a divisor of num_heads; 0 is num_heads.", "[0, inf)"
  )
  head_dim: int = knob(0, "Width of a head; 0 is width / num_heads.", "[0, inf)")
  mlp_width: int = knob(
    0, "Hidden width of the gated MLP; 0 is the decoder's own choice.", "[0, inf)"
  )
  short_convolution: int = knob(
    4, "Tokens seen by a causal depthwise convolution on q, k and v; 0 is none.", "[0, inf)"
  )
  dropout: float = knob(0.0, "Probability that an activation is dropped in training.", "[0, 1)")
  tie_embeddings: bool = knob(True, "Use the embedding table as the output layer too.")
  dtype: Literal["float32", "bfloat16"] = knob(
    "float32", "Arithmetic of activations; parameters, logits and the loss are float32."
  )
  remat: Literal["none", "dots", "full"] = knob(
    "none", "What the backward pass recomputes instead of keeping.", free=True
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
  """AdamW and its schedule."""

  lr: float = knob(3e-3, "Peak learning rate.", "[0, inf)")
  schedule: Literal["cosine", "constant", "wsd"] = knob(
    "cosine",
    "After the warm-up: a half cosine, nothing, or constant with a linear decay at the end.",
  )
  warmup: int = knob(
    50, "Steps of linear warm-up, from lr / (warmup + 1); at most half of --steps.", "[0, inf)"
  )
  decay: float = knob(0.2, "wsd: share of the steps spent decaying at the end.", "(0, 1]")
  final: float = knob(0.1, "Last learning rate, as a share of the peak (cosine, wsd).", "[0, 1]")
  b1: float = knob(0.9, "Adam's decay of the mean gradient.", "[0, 1)")
  b2: float = knob(0.98, "Adam's decay of the squared gradient.", "[0, 1)")
  weight_decay: float = knob(
    0.1, "Decoupled weight decay, on parameters of two axes and more.", "[0, inf)"
  )
  clip: float = knob(1.0, "Largest global gradient norm; 0 does not clip.", "[0, inf)")
  accumulate: int = knob(
    1,
    "Pieces that a batch is cut into, to save memory; without dropout the result is that of the "
    "whole.",
    "[1, inf)",
  )
  ema: float = knob(0.0, "Decay per step of an average of the parameters; 0 keeps none.", "[0, 1)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
  """When the state is written."""

  every: int = knob(
    100, "Steps between checkpoints; 0 writes only the last.", "[0, inf)", free=True
  )
  keep: int = knob(3, "Newest checkpoints kept.", "[1, inf)", free=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
  """When, and on how much, the model is validated."""

  every: int = knob(
    100, "Steps between validations; 0 validates only the end.", "[0, inf)", free=True
  )
  sequences: int = knob(
    128,
    "Validation sequences scored during training, a fair sample; 0 is all.",
    "[0, inf)",
    free=True,
  )
  final_sequences: int = knob(
    512, "Validation sequences scored at the end; 0 is all.", "[0, inf)", free=True
  )
  batch_size: int = knob(0, "Sequences scored at a time; 0 is --batch_size.", "[0, inf)", free=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
  """What is told along the way."""

  every: int = knob(10, "Steps between rows of metrics.jsonl.", "[1, inf)", free=True)
  sample_every: int = knob(300, "Steps between printed samples; 0 is none.", "[0, inf)", free=True)
  sample_tokens: int = knob(120, "Tokens of a sample.", "[1, inf)", free=True)
  tensorboard: bool = knob(False, "Write TensorBoard events into the workdir too.", free=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
  """When a run that goes wrong is stopped; a loss that is not a number always stops it."""

  jump: float = knob(
    3.0, "Nats by which a loss may exceed the recent median; 0 is any.", "[0, inf)", free=True
  )
  window: int = knob(50, "Steps of which that median is taken.", "[1, inf)", free=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
  """How many devices share each axis; their product is the number of devices used."""

  data: int = knob(1, "Copies of the model, each on its share of the batch.", "[1, inf)", free=True)
  fsdp: int = knob(1, "Devices that share the batch and the parameters.", "[1, inf)", free=True)
  sequence: int = knob(1, "Devices that share each sequence.", "[1, inf)", free=True)
  tensor: int = knob(
    1, "Devices that share heads, hidden units and vocabulary.", "[1, inf)", free=True
  )
  cpu_devices: int = knob(
    0, "Virtual devices to make of the CPU; 0 leaves the platform as it is.", "[0, inf)", free=True
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DistributedConfig:
  """Several processes, one run: start the same command in each, with its own process_id."""

  coordinator: str = knob(
    "", "Address host:port of process 0; empty is a single process.", free=True
  )
  processes: int = knob(1, "Processes in all.", "[1, inf)", free=True)
  process_id: int = knob(0, "Number of this process, from 0.", "[0, inf)", free=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
  """One run of experiments.train."""

  workdir: str = knob("", "Folder of the run; empty is runs/<task>[-<attention>].", free=True)
  preset: str = knob(
    "bytes", "Defaults to start from: bytes, mqar, smoke, griffin, based, samba.", free=True
  )
  task: str = knob("bytes", "What is learned: bytes, copy, selective_copy, induction, recall, hmm.")
  attention: str = knob(
    "softmax", "Mechanism of each layer, repeated over the depth, as linear,softmax:window=128."
  )
  steps: int = knob(
    750, "Optimizer steps in all; a resumed run counts from its beginning.", "[1, inf)", free=True
  )
  seed: int = knob(0, "Seed of parameters, batches, dropout and generated data.", "[0, 4294967295]")
  batch_size: int = knob(8, "Sequences per step, over all devices and processes.", "[1, inf)")
  seq_len: int = knob(128, "Tokens per sequence.", "[1, inf)")
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  optim: OptimConfig = OptimConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  log: LogConfig = LogConfig()
  guard: GuardConfig = GuardConfig()
  mesh: MeshConfig = MeshConfig()
  distributed: DistributedConfig = DistributedConfig()

  def __post_init__(self):
    flags.check_bounds(self)
    _check_model(self.model, self.mesh)
    _check_batch(self)


def _check_model(model: ModelConfig, mesh: MeshConfig) -> None:
  if not model.head_dim and model.width % model.num_heads:
    raise ValueError(
      f"--model.width={model.width} is not a multiple of --model.num_heads={model.num_heads}"
    )
  kv_heads = model.num_kv_heads or model.num_heads
  if model.num_heads % kv_heads:
    raise ValueError(
      f"--model.num_heads={model.num_heads} is not a multiple of --model.num_kv_heads={kv_heads}"
    )
  share = mesh.tensor * mesh.sequence
  if kv_heads % share:
    raise ValueError(
      f"{kv_heads} key/value heads cannot be shared by --mesh.tensor={mesh.tensor} x "
      f"--mesh.sequence={mesh.sequence} = {share} devices"
    )


def _check_batch(config: Config) -> None:
  piece, rest = divmod(config.batch_size, config.optim.accumulate)
  if rest:
    raise ValueError(
      f"--batch_size={config.batch_size} is not a multiple of "
      f"--optim.accumulate={config.optim.accumulate}"
    )
  share = config.mesh.data * config.mesh.fsdp
  if piece % share:
    raise ValueError(
      f"{piece} sequences at a time (--batch_size / --optim.accumulate) cannot be shared by "
      f"--mesh.data={config.mesh.data} x --mesh.fsdp={config.mesh.fsdp} = {share} devices"
    )
  if config.seq_len % config.mesh.sequence:
    raise ValueError(
      f"--seq_len={config.seq_len} is not a multiple of --mesh.sequence={config.mesh.sequence}"
    )
  if config.batch_size % config.distributed.processes:
    raise ValueError(
      f"--batch_size={config.batch_size} is not a multiple of --distributed.processes="
      f"{config.distributed.processes}"
    )
  if config.distributed.process_id >= config.distributed.processes:
    raise ValueError(
      f"--distributed.process_id={config.distributed.process_id} does not count from 0 among "
      f"--distributed.processes={config.distributed.processes}"
    )


# Each preset changes defaults before the command line is read. The last three are hybrids, laid out
# as published and small: Griffin's and Samba's windows are half of the length that they learn on.
# Samba's layers were Mamba's; here they are Mamba-2's.
PRESETS: Mapping[str, Mapping[str, Any]] = {
  "bytes": {},
  "mqar": {
    "task": "recall",
    "steps": 2000,
    "batch_size": 64,
    "seq_len": 64,
    "model.num_layers": 2,
    "model.width": 64,
    "model.num_heads": 1,
    "log.sample_every": 0,
  },
  "smoke": {
    "steps": 20,
    "batch_size": 4,
    "seq_len": 64,
    "model.num_layers": 2,
    "model.width": 32,
    "model.num_heads": 2,
    "optim.warmup": 5,
    "checkpoint.every": 10,
    "evaluation.every": 10,
    "evaluation.sequences": 8,
    "evaluation.final_sequences": 8,
    "log.every": 1,
    "log.sample_every": 0,
  },
  "griffin": {
    "attention": "rglru,rglru,softmax:window=128",
    "seq_len": 256,
    "model.num_layers": 6,
    "model.num_kv_heads": 1,
    "model.short_convolution": 0,
  },
  "based": {
    "attention": "taylor,softmax:window=64",
    "seq_len": 256,
    "model.short_convolution": 3,
  },
  "samba": {
    "attention": "mamba2,softmax:window=128",
    "seq_len": 256,
    "model.short_convolution": 0,
  },
}


def from_argv(argv: Sequence[str], doc: str) -> Config:
  """The configuration that a command line asks for, with its workdir filled in."""
  config = flags.parse(argv, Config(), doc=doc, presets=PRESETS)
  if config.workdir:
    return config
  name = config.task if config.attention == "softmax" else f"{config.task}-{config.attention}"
  return dataclasses.replace(config, workdir="runs/" + re.sub(r"[^\w.=-]+", "-", name))


def to_json(config: Config) -> dict[str, Any]:
  """The configuration as nested dicts, for config.json and for a checkpoint's metadata."""
  return flags.to_json(config)


def from_json(tree: Mapping[str, Any]) -> Config:
  """The configuration that `to_json` wrote."""
  return flags.from_json(Config(), tree)


def save(config: Config) -> None:
  """Writes config.json and flags.txt (for `--flagfile`) into the workdir."""
  folder = pathlib.Path(config.workdir)
  (folder / "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n")
  (folder / "flags.txt").write_text(flags.to_text(config))


def load(workdir: str) -> Config:
  """The configuration of the run in `workdir`, as it lies there now.

  Raises:
    UserError: there is no run in `workdir`, or its config.json is not one of ours.
  """
  path = pathlib.Path(workdir) / "config.json"
  try:
    tree = json.loads(path.read_text())
    return dataclasses.replace(from_json(tree), workdir=workdir)
  except FileNotFoundError as error:
    raise UserError(f"--workdir={workdir} holds no run: {path} does not exist") from error
  except (ValueError, OSError, TypeError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error


def differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
  """What a resumed run asks for and its checkpoint has not, as (harmless, harmful) phrases."""
  before, harmless, harmful = flags.leaves(old), [], []
  for name, (value, field) in flags.leaves(new).items():
    if value != before[name][0] and name not in ("workdir", "preset"):
      phrase = f"--{name}={value} (was {before[name][0]})"
      (harmless if field.metadata["free"] else harmful).append(phrase)
  return harmless, harmful
