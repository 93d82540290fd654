"""Small runs for the tests of experiments: a configuration that trains in seconds, processes."""

import os
import pathlib
import subprocess
import sys
from typing import Any

from experiments import flags
from experiments.config import Config

ROOT = pathlib.Path(__file__).parent.parent

TINY = {
  "task": "hmm",
  "steps": 6,
  "batch_size": 8,
  "seq_len": 32,
  "model.width": 32,
  "model.num_heads": 4,
  "model.short_convolution": 0,
  "optim.warmup": 2,
  "checkpoint.every": 2,
  "evaluation.every": 3,
  "evaluation.sequences": 8,
  "evaluation.final_sequences": 16,
  "log.every": 1,
  "log.sample_every": 0,
  "log.sample_tokens": 4,
}


def tiny(workdir: Any, **changes: Any) -> Config:
  """A configuration that trains in seconds, of a layer for each mechanism; `optim__lr=0.1` changes
  optim.lr.
  """
  layers = {"model.num_layers": len(changes.get("attention", "one").split(","))}
  dotted = {name.replace("__", "."): value for name, value in changes.items()}
  return flags.replace(Config(workdir=str(workdir)), TINY | layers | dotted)


def command(config: Config, program: str = "train") -> list[str]:
  """The command line of a run of `config`."""
  return [sys.executable, "-m", f"experiments.{program}", *flags.to_text(config).split()]


def spawn(arguments: list[str], **how: Any) -> subprocess.Popen[str]:
  """Starts a program in the repository's root, with its output piped."""
  environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
  return subprocess.Popen(
    arguments,
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **how,
  )
