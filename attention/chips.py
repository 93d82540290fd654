"""Which chip a program is being made for."""

import os
import re
from typing import Any, NamedTuple

import jax

_BEFORE_AMPERE = r"\b(GTX|TITAN|Tesla|Quadro|RTX 20[5-8]0|GV100|[KMPTV]\d+S?)\b"
"""In the names of older NVIDIA GPUs."""


class Chip(NamedTuple):
  """A device, by the words that its driver uses."""

  platform: str
  """"cpu", "gpu" or "tpu"."""
  kind: str
  """The model, such as "NVIDIA H200" or "TPU v5 lite"."""


def current() -> Chip:
  """The chip that operations run on from here: of the mesh in context if it names one, so that a
  program can be made for a chip that is absent, else the default device.
  """
  described = _device()
  platform = "gpu" if described.platform in ("cuda", "rocm") else described.platform
  return Chip(platform, described.device_kind)


def _device() -> Any:
  described = jax.sharding.get_abstract_mesh().abstract_device
  if described is None:
    default = jax.config.jax_default_device
    described = default if isinstance(default, jax.Device) else jax.devices(default)[0]
  return described


def not_hopper() -> str | None:
  """Why Hopper's instructions are not to be had, or None."""
  chip = current()
  if chip.platform == "gpu" and re.search(r"\bG?H(100|200|800|20)\b", chip.kind):
    return None
  return f"it needs a Hopper GPU and this is {chip.kind}"


def not_tpu() -> str | None:
  """Why a TPU's instructions, of v4 or newer, are not to be had, or None."""
  chip = current()
  if chip.platform == "tpu" and not re.match(r"TPU v[23]\b", chip.kind):
    return None
  return f"it needs a TPU v4 or newer and this is {chip.kind}"


def not_ampere() -> str | None:
  """Why an NVIDIA GPU of compute capability 8.0 or newer is not to be had, or None. A device that
  is absent is known by its name alone.
  """
  chip = current()
  if chip.platform == "gpu" and "NVIDIA" in chip.kind:
    capability = getattr(_device(), "compute_capability", None)
    old = re.search(_BEFORE_AMPERE, chip.kind) if capability is None else float(capability) < 8.0
    if not old:
      return None
  return f"it needs an NVIDIA GPU, Ampere or newer, and this is {chip.kind}"


def has_one_core() -> bool:
  """Whether the mesh in context has, of this machine's CPU, as many devices as there are cores."""
  if current().platform != "cpu":
    return False
  affinity = getattr(os, "sched_getaffinity", None)  # Not on every system.
  cores = len(affinity(0)) if affinity else os.cpu_count() or 1
  mesh = jax.sharding.get_abstract_mesh()
  return cores <= (1 if mesh.empty else mesh.size // jax.process_count())
