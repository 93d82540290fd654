"""Where arrays live: logical axis names, the mesh axes behind them, the boundary of attention.

A module names the axes of what it makes ("batch", "embed", "model_heads"); the mesh in context, set
by `jax.set_mesh`, decides what those names mean. Without a mesh every name means nothing and every
function here does nothing, so one model runs on a laptop core and on a pod.

Attention is the one place where tokens meet. There the sequence axis of the mesh turns into a head
axis (Ulysses, Jacobs et al. 2023, https://arxiv.org/abs/2309.14509): an all-to-all gives each
device all tokens of some heads, which is exact for every mechanism, quadratic or recurrent.

    [B@(data,fsdp), T@sequence, N@tensor, H]    outside: projections, MLP, norms
    [B@(data,fsdp), T, N@(tensor,sequence), H]  inside the boundary
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

RULES: Final[Mapping[str, tuple[str, ...]]] = {
  "batch": ("data", "fsdp"),
  "sequence": ("sequence",),
  "heads": ("tensor", "sequence"),  # inside the attention boundary
  "model_heads": ("tensor",),  # in parameters, and outside the boundary
  "embed": ("fsdp",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
}
"""Logical axis -> the mesh axes that cut it, as far as the mesh in context has them."""


def mesh_axes(name: str) -> dict[str, int]:
  """The mesh axes that cut the logical axis `name`, with their sizes; {} without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  return {axis: mesh.shape[axis] for axis in RULES[name] if types.get(axis) == AxisType.Explicit}


def spec(*names: str | None) -> PartitionSpec | None:
  """The PartitionSpec of an array whose axes have these logical names; None without a mesh.

  Trailing axes that are not named are whole on every device.
  """
  if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
    return None
  axes = [tuple(mesh_axes(name)) if name else () for name in names]
  return PartitionSpec(*(a if len(a) > 1 else a[0] if a else None for a in axes))


def like(x: jax.Array) -> NamedSharding | None:
  """The sharding of `x`, to be given to what should lie beside it; None without a mesh."""
  return None if spec() is None else jax.typeof(x).sharding


def check_divisible(argument: str, size: int, name: str) -> None:
  """Raises ValueError unless the mesh cuts `size`, of the logical axis `name`, into equal parts."""
  axes = mesh_axes(name)
  parts = math.prod(axes.values())
  if size % parts:
    shown = " * ".join(f"{axis}={n}" for axis, n in axes.items())
    raise ValueError(f"{argument}={size} is not divisible by {parts}, the mesh's {shown}.")


def reshard(tree: Any, sharding: PartitionSpec | NamedSharding | None) -> Any:
  """Moves every array of `tree` to `sharding`; does nothing where that is None."""
  if sharding is None:
    return tree
  return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, sharding), tree)


def boundary(
  fn: Callable[..., Any],
  arguments: tuple[Any, ...],
  in_specs: tuple[PartitionSpec | None, ...],
  out_specs: PartitionSpec | None,
) -> Any:
  """Calls `fn(*arguments)` on each device's own block: all that an attention mechanism sees.

  Args:
    fn: a function of local arrays; it must not close over arrays.
    arguments: pytrees of arrays, or None.
    in_specs: for each argument, the spec that all its arrays are moved to.
    out_specs: the spec of everything that `fn` returns.
  """
  if out_specs is None:
    return fn(*arguments)
  moved = tuple(reshard(tree, where) for tree, where in zip(arguments, in_specs, strict=True))
  local = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
  return local(*moved)
