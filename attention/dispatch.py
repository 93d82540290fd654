"""Which implementation of an op runs, and why not the others. Decided once, before anything is
computed.

An ops file with more than one implementation holds a table `IMPLEMENTATIONS`, the best first, and a
function `describe` with the op's signature that checks the arguments and returns the call as data.
Each implementation says of a call what keeps it from running it *forward and backward*, or None.
`implementation=None` takes the first that has no objection; a named one runs or raises: it never
falls back. What was chosen is computed by `run`, as one program. Where a file has a second op of
several implementations, `OTHER_OPS` maps its name to its own (`describe`, table).
"""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention.types import Foreign


class Implementation(NamedTuple):
  """One way to compute an op."""

  run: Callable[[Any], Any]
  """Computes the call."""
  unsupported: Callable[[Any], str | None]
  """Why this call cannot run here, or None where it can."""
  automatic: Callable[[Any], str | None] = lambda call: None
  """Why `implementation=None` passes this one over although it could run, or None."""


def suggest(word: str, words: Iterable[str]) -> str:
  """The end of a sentence about a misspelt word: what was meant, or what there is."""
  words = list(words)
  near = difflib.get_close_matches(word, words, n=1)
  return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(words)}"


def choose(name: str | None, implementations: Mapping[str, Implementation], call: Any) -> str:
  """The name of the implementation that runs `call`.

  Raises:
    ValueError: no implementation has that name.
    NotImplementedError: the named one cannot run this call, or none can; the reasons are in the
      message.
  """
  if name is not None:
    if name not in implementations:
      raise ValueError(f"implementation {name!r} is unknown; {suggest(name, implementations)}")
    if reason := implementations[name].unsupported(call):
      raise NotImplementedError(f"implementation {name!r} cannot run this call: {reason}")
    return name
  reasons = refusals(implementations, call)
  for name in implementations:
    if name not in reasons:
      return name
  listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
  raise NotImplementedError(f"no implementation runs this call: {listed}")


def run(name: str | None, implementations: Mapping[str, Implementation], call: Any) -> Any:
  """Computes `call` by the implementation that `choose` names, as one program that is kept: outside
  of `jax.jit` the next call like it compiles nothing.

  No program is kept of what may change unseen, functions of the caller's (`Foreign`) and objects
  that JAX does not know: a call that has one is computed an operation at a time.
  """
  compute = implementations[choose(name, implementations, call)].run
  leaves, tree = jax.tree.flatten(call, is_leaf=lambda x: isinstance(x, Foreign))
  if not all(isinstance(leaf, _ARRAY | _CONSTANT) for leaf in leaves):
    return compute(jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, _ARRAY) else x, call))
  constants = tuple(None if isinstance(leaf, _ARRAY) else leaf for leaf in leaves)
  arrays = [leaf for leaf in leaves if isinstance(leaf, _ARRAY)]
  return _attention(compute, tree, constants, arrays)


_ARRAY = jax.Array | np.ndarray
_CONSTANT = bool | int | float | str | np.generic


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attention(compute, tree, constants, arrays):
  """`compute` of a call in parts: its constants, None where it has the next array. Profiles show
  this name.
  """
  rest = iter(arrays)
  return compute(jax.tree.unflatten(tree, [next(rest) if x is None else x for x in constants]))


def refusals(implementations: Mapping[str, Implementation], call: Any) -> dict[str, str]:
  """Why each implementation that `implementation=None` would pass over is passed over."""
  reasons = {n: i.unsupported(call) or i.automatic(call) for n, i in implementations.items()}
  return {name: reason for name, reason in reasons.items() if reason}


def explain(
  op: Callable[..., Any], *args: Any, implementation: str | None = None, **kwargs: Any
) -> str:
  """Which implementation a call of `op` would run, and why it would not run the others. Computes
  nothing.

      print(attention.explain(attention.dot_product_attention, q, k, v, is_causal=True))

  Arrays may be `jax.ShapeDtypeStruct`s. Raises what the call itself would raise.
  """
  leaves, tree = jax.tree.flatten((args, kwargs))
  is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
  lines: list[str] = []

  def trace(arrays):
    arrays = iter(arrays)
    merged = [next(arrays) if flag else leaf for flag, leaf in zip(is_array, leaves, strict=True)]
    args, kwargs = jax.tree.unflatten(tree, merged)
    lines.extend(_explanation(op, implementation, args, kwargs))

  jax.eval_shape(trace, [leaf for flag, leaf in zip(is_array, leaves, strict=True) if flag])
  return "\n".join(lines)


def _explanation(op, implementation, args, kwargs) -> Iterator[str]:
  module = sys.modules[op.__module__]
  own = module.describe, module.IMPLEMENTATIONS
  describe, table = getattr(module, "OTHER_OPS", {}).get(op.__name__, own)
  call = describe(*args, **kwargs)
  chosen = choose(implementation, table, call)
  reasons = refusals(table, call)
  yield f"{op.__name__} runs {chosen!r}" + (", as named" if implementation else "")
  for name in table:
    if name != chosen:
      yield f"  not {name!r}: {reasons.get(name, f'{chosen!r} was preferred')}"
