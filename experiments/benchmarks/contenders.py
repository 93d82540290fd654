"""Who is measured: a name -> a function of (q, k, v), its right answer, why it may be absent."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np

from attention.variants import VARIANTS, Layer, parse
from experiments.benchmarks import torch_worker
from experiments.benchmarks.suites import Suite

FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
ROOT = pathlib.Path(__file__).resolve().parents[2]

# Ours, each as `--attention` would spell it.
OURS: Final[Mapping[str, str]] = {
  "tiled": "softmax:implementation=tiled",
  "tiled, window 256": "softmax:window=256:implementation=tiled",
  "linear": "linear:feature_map=identity:normalize=false:implementation=chunked",
  "linear, elu+1": "linear:feature_map=elu_plus_one:normalize=true:implementation=chunked",
  "recurrence": "linear:feature_map=identity:normalize=false:implementation=reference",
}
PER_CORE: Final = ", a device per core"
"""The end of a name of ours whose heads are cut over devices, as many as there are cores."""
IN_TORCH: Final[Mapping[str, tuple[str, str]]] = {
  "torch": ("", "softmax"),
  "fla": ("fla", "linear"),
}
"""Who runs in the worker: its backend there, and whose reference is its truth."""
PEERS: Final = ("jax.nn", "tokamax", *IN_TORCH)
"""Who is not ours: it is left out where it fails."""
VARIANT: Final = "variant "  # "variant softmax" is that entry with its default options


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
  """A function of q, k, v [B T N H] and, by keyword, what else the mechanism reads."""

  name: str
  attend: Callable[..., jax.Array]
  truth: Callable[..., jax.Array]
  """The answer it must give: slow, sure, and of other code."""
  layer: Layer | None = None
  """The mechanism, if it is ours."""


def names(suite: Suite) -> list[str]:
  """Every contender whose time a suite takes, peers first."""
  variants = [VARIANT + name for name in VARIANTS] if suite.every_variant else []
  return [*suite.lengths, *variants]


def lengths(suite: Suite, name: str) -> tuple[int, ...]:
  """The lengths at which a contender is timed."""
  return suite.lengths.get(name, suite.every_variant)


def absent(name: str) -> str | None:
  """Why a contender that runs in this process cannot, or None."""
  if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
    return "tokamax is not installed (pip install 'frugal-attention[peers]')"
  return None


def make(name: str) -> Contender:
  """The contender of this name; those in torch have none, they run elsewhere."""
  softmax = VARIANTS["softmax"].reference
  if name == "jax.nn":
    dense = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return Contender(name, dense, softmax)
  if name == "tokamax":
    library = importlib.import_module("tokamax")
    chunked = lambda q, k, v: library.dot_product_attention(
      q, k, v, is_causal=True, implementation="xla_chunked"
    )
    return Contender(name, chunked, softmax)
  spec = (
    name.removeprefix(VARIANT) if name.startswith(VARIANT) else OURS[name.removesuffix(PER_CORE)]
  )
  (layer,) = parse(spec)
  reference = lambda *qkv, **inputs: layer.variant.reference(*qkv, **inputs, **layer.options)
  return Contender(name, layer.attend, reference, layer)


def arguments(suite: Suite, T: int, seed: int = 0) -> list[jax.Array]:
  """q, k, v and the output's cotangent, standard normal, float32 [1 T N H]."""
  shape = (1, T, suite.heads, suite.head_dim)
  return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), 4)]


def place(name: str, arrays: Sequence[jax.Array]) -> list[jax.Array]:
  """Arrays [1 T N H] as a contender takes them: on one device, or their heads cut over all."""
  if not name.endswith(PER_CORE):
    return list(arrays)
  devices = jax.devices()
  mesh = jax.make_mesh((math.gcd(len(devices), arrays[0].shape[2]),), ("heads",))
  return jax.device_put(list(arrays), jax.NamedSharding(mesh, jax.P(None, None, "heads")))


def inputs(contender: Contender, suite: Suite, T: int) -> dict[str, jax.Array]:
  """What a mechanism of ours reads beside q, k and v."""
  if contender.layer is None:
    return {}
  N, H = suite.heads, suite.head_dim
  return contender.layer.variant.example_inputs(jax.random.key(1), 1, T, N, N, H, H)


def program(contender: Contender, kind: str) -> Callable[..., Any]:
  """(q, k, v, cotangent, inputs) -> the output and, if asked, every gradient; not yet jitted."""

  def forward(q, k, v, cotangent, inputs):
    del cotangent
    return contender.attend(q, k, v, **inputs)

  def both(q, k, v, cotangent, inputs):
    attend = lambda q, k, v, inputs: contender.attend(q, k, v, **inputs)
    out, pull = jax.vjp(attend, q, k, v, inputs)
    return out, pull(cotangent)

  return {FORWARD: forward, BOTH: both}[kind]


def error(contender: Contender, suite: Suite, T: int) -> float:
  """The largest difference from the truth, as a share of the largest true value."""
  qkv = arguments(suite, T)[:3]
  extra = inputs(contender, suite, T)
  got, want = (
    np.asarray(jax.jit(contender.attend)(*place(contender.name, qkv), **extra)),
    np.asarray(jax.jit(contender.truth)(*qkv, **extra)),
  )
  return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


class Torch:
  """The worker, and what is said to it. `absent` tells why there is none. To be used by `with`."""

  def __init__(
    self,
    python: str = "",
    module: str = torch_worker.__name__,
    environment: Mapping[str, str] = {},
  ) -> None:
    self.absent: str | None = None
    self.versions: dict[str, Any] = {}
    self._open = contextlib.ExitStack()
    if not python and importlib.util.find_spec("torch") is None:
      self.absent = "torch is not installed (another Python that has it: --torch_python=PATH)"
      return
    command = [python or sys.executable, "-m", module]
    # Ruff does not see that the exit stack closes it.
    self._said = self._open.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
    pipe = subprocess.PIPE
    # Another interpreter must not see the packages that were added to this one's path.
    hidden = ("PYTHONPATH",) if python else ()
    theirs = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
      self._process = self._open.enter_context(
        subprocess.Popen(
          command,
          cwd=ROOT,
          env={**theirs, **environment},
          stdin=pipe,
          stdout=pipe,
          stderr=self._said,
          text=True,
        )
      )
      self.versions = self._reply()
    except (OSError, RuntimeError, ValueError) as problem:
      self._open.close()
      self.absent = f"torch did not start: {problem}"

  def __enter__(self) -> "Torch":
    return self

  def __exit__(self, *error: object) -> None:
    self._open.close()

  def ask(self, do: str, **request: Any) -> dict[str, Any]:
    """One request and its reply."""
    assert self._process.stdin is not None, "the worker has a pipe"
    try:
      self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
      self._process.stdin.flush()
    except BrokenPipeError as gone:
      raise RuntimeError("it ended before it was asked") from gone
    return self._reply()

  def _reply(self) -> dict[str, Any]:
    assert self._process.stdout is not None, "the worker has a pipe"
    line = self._process.stdout.readline()
    if not line:
      self._said.seek(0)
      said = self._said.read().strip().splitlines()
      raise RuntimeError(said[-1] if said else "it ended without a word")
    reply = json.loads(line)
    if "refused" in reply:
      raise RuntimeError(reply["refused"])
    return reply

  def load(self, suite: Suite, T: int) -> None:
    """Hands over the same numbers that the others read."""
    self.hand_over(arguments(suite, T))

  def hand_over(
    self, arrays: Sequence[jax.Array], names: Sequence[str] = torch_worker.NAMES
  ) -> None:
    """q, k, v and the output's cotangent, float32 [B T N H]; or as they are called."""
    with tempfile.TemporaryDirectory() as folder:
      for name, array in zip(names, arrays, strict=True):
        pathlib.Path(folder, name).write_bytes(np.asarray(array).tobytes())
      self.ask("load", folder=folder, shape=list(arrays[0].shape))

  def absence(self, name: str) -> str | None:
    """Why this one of `IN_TORCH` cannot be asked, or None."""
    if self.absent or name == "torch":
      return self.absent
    missing = "is not installed beside torch (pip install flash-linear-attention)"
    return None if self.versions[name] else f"{name} {missing}"

  def error(self, name: str, suite: Suite, T: int) -> float:
    """As `error`, of what was loaded."""
    q, k, v, _ = arguments(suite, T)
    backend, variant = IN_TORCH[name]
    options = {} if name == "torch" else {"normalize": False}
    want = np.asarray(VARIANTS[variant].reference(q, k, v, **options))
    answer = self.answer(want.shape, backend=backend)
    return float(np.max(np.abs(answer - want)) / np.max(np.abs(want)))

  def answer(self, shape: Sequence[int], **request: Any) -> np.ndarray:
    """Its answer to what was handed over, float32 [B T N H]."""
    with tempfile.TemporaryDirectory() as folder:
      self.ask("answer", folder=folder, **request)
      return np.frombuffer(pathlib.Path(folder, "out").read_bytes(), np.float32).reshape(shape)
