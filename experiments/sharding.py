"""Devices of a run: processes, virtual CPU devices, the mesh, and how a batch lies on it."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attention.modules.sharding import spec
from experiments.config import DistributedConfig, MeshConfig
from experiments.flags import UserError

AXES = ("data", "fsdp", "sequence", "tensor")


def start(mesh: MeshConfig, distributed: DistributedConfig) -> None:
  """Sets up virtual devices and joins the other processes, before anything asks JAX for a device.

  Raises:
    UserError: JAX has its devices already, or the other processes cannot be reached.
  """
  if mesh.cpu_devices:
    try:
      jax.config.update("jax_platforms", "cpu")
      jax.config.update("jax_num_cpu_devices", mesh.cpu_devices)
    except RuntimeError as error:
      if jax.local_device_count() != mesh.cpu_devices:
        raise UserError(
          f"--mesh.cpu_devices={mesh.cpu_devices} comes too late: JAX has started with "
          f"{jax.local_device_count()}"
        ) from error
  if distributed.coordinator:
    try:
      jax.distributed.initialize(
        distributed.coordinator,
        num_processes=distributed.processes,
        process_id=distributed.process_id,
      )
    except (RuntimeError, ValueError) as error:
      raise UserError(
        f"--distributed.coordinator={distributed.coordinator}: {' '.join(str(error).split())}"
      ) from error
  elif distributed.processes > 1:
    raise UserError(
      f"--distributed.processes={distributed.processes} needs --distributed.coordinator=host:port"
    )


def make_mesh(config: MeshConfig) -> Mesh | None:
  """The mesh of a run, with the axes that are longer than 1; None for a single device.

  Raises:
    UserError: there are too few devices for the mesh, or processes whose devices it leaves idle.
  """
  sizes = {axis: getattr(config, axis) for axis in AXES}
  needed, there = math.prod(sizes.values()), jax.device_count()
  product = " x ".join(f"--mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
  if needed > there:
    raise UserError(
      f"{product} needs {needed} devices and there are {there}; "
      f"on a CPU, --mesh.cpu_devices={needed} makes them"
    )
  if jax.process_count() > 1 and needed != there:
    raise UserError(
      f"{product or 'a mesh of one device'} uses {needed} devices of the {there} that "
      f"{jax.process_count()} processes have; use them all"
    )
  if needed == 1:
    return None
  axes = {axis: size for axis, size in sizes.items() if size > 1}
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    axis_types=(AxisType.Explicit,) * len(axes),
    devices=jax.devices()[:needed],
  )


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """The context in which arrays are made and steps are run on `mesh`."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


class Rows(NamedTuple):
  """The part of a global batch that this process loads: part `index` of `count` equal ones."""

  index: int
  count: int


def rows(mesh: Mesh | None, batch_size: int) -> Rows:
  """Which rows of a global batch the devices of this process hold."""
  if mesh is None or jax.process_count() == 1:
    return Rows(0, 1)
  places = _batch_sharding(mesh).addressable_devices_indices_map((batch_size, _tokens(mesh)))
  ends = [place[0].indices(batch_size) for place in places.values() if place]
  low, high = min(end[0] for end in ends), max(end[1] for end in ends)
  size = high - low
  if batch_size % size or low % size:
    raise UserError(
      f"--batch_size={batch_size} does not fall into equal parts over {jax.process_count()} "
      "processes"
    )
  return Rows(low // size, batch_size // size)


def _tokens(mesh: Mesh) -> int:
  return mesh.shape.get("sequence", 1)


def _batch_sharding(mesh: Mesh) -> NamedSharding:
  with jax.set_mesh(mesh):
    return NamedSharding(mesh, spec("batch", "sequence") or PartitionSpec())


def place(mesh: Mesh | None, batch: Mapping[str, np.ndarray], share: Rows) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch (see `rows`) onto its devices, as global arrays."""
  if mesh is None:
    return {name: jax.device_put(value) for name, value in batch.items()}
  sharding = _batch_sharding(mesh)

  def put(local: np.ndarray) -> jax.Array:
    first, shape = share.index * len(local), (share.count * len(local), *local.shape[1:])

    def block(where: tuple[slice, ...] | None) -> np.ndarray:
      rows, *columns = where or (slice(None),)
      start, stop, _ = rows.indices(shape[0])
      return local[start - first : stop - first][:, *columns]

    return jax.make_array_from_callback(shape, sharding, block)

  return {name: put(value) for name, value in batch.items()}


def gather(tree: Any) -> Any:
  """A tree of arrays as whole NumPy arrays, on every process; all processes must call it."""
  if jax.process_count() > 1:
    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.tree.map(np.asarray, tree)
