"""Ops on arrays that a mesh of explicit axes cuts, as `jax.make_mesh` makes them.

There an array's type says which axes of the mesh cut it, and every reshape and every loop must
agree with that. What lies where inside of an op is XLA's to decide: the op runs with these axes
automatic, and what it returns is cut as its first argument is. Batch and heads may be cut; tokens
may not, for in an op they meet. XLA does not cut a chip's kernel: that wants `jax.shard_map`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def op[**P, R](
  *results: str, of: str = "B T N H", asked_by: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """A decorator that makes an op run on such arrays; on others it is what it was.

  Args:
    results: the leading axes of each result, and of all arrays in it.
    of: the axes of the first argument; the first of them may be missing.
    asked_by: the argument without which the first result comes alone.
  """

  def decorate(function: Callable[P, R]) -> Callable[P, R]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
      leaves, tree = jax.tree.flatten((args, kwargs))
      is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
      arrays = [leaf for leaf, flag in zip(leaves, is_array, strict=True) if flag]
      meshes = [jax.typeof(x).sharding.mesh for x in arrays if any(_cuts(x))]
      if not meshes:
        return function(*args, **kwargs)
      given = signature.bind(*args, **kwargs).arguments
      first, *_ = given.values()
      axes = of.split()[-first.ndim :]
      _check_tokens(function.__name__, given, axes.index("T"))
      cuts = dict(zip(axes, _cuts(first), strict=True))
      specs = [PartitionSpec(*(cuts[a] for a in result.split() if a in cuts)) for result in results]
      where = tuple(NamedSharding(meshes[0], spec) for spec in specs)

      def body(*arrays):
        arrays = iter(arrays)
        merged = [next(arrays) if flag else x for x, flag in zip(leaves, is_array, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, merged)
        return function(*args, **kwargs)

      alone = len(results) == 1 or (asked_by is not None and not given.get(asked_by))
      automatic: Any = jax.sharding.auto_axes(body, out_sharding=where[0] if alone else where)
      return automatic(*arrays)

    return run

  return decorate


def _cuts(x: Any) -> tuple[Any, ...]:
  """The explicit mesh axes that cut each axis of an array; None where none does."""
  spec = tuple(getattr(jax.typeof(x).sharding, "spec", ()))
  return spec + (None,) * (x.ndim - len(spec))


def _check_tokens(op: str, given: dict[str, Any], axis: int) -> None:
  """Refuses queries, keys or values whose tokens are cut."""
  first, *_ = given.values()
  for name, x in list(given.items())[:3]:
    if getattr(x, "ndim", None) == first.ndim and (cut := _cuts(x)[axis]):
      raise NotImplementedError(
        f"{op} needs all tokens on every device, and the mesh axis {cut!r} cuts those of {name} "
        f"{list(x.shape)}; jax.sharding.reshard can cut its batch or its heads instead"
      )
