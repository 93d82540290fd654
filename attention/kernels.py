"""How an op calls a hand-written kernel, whatever it computes: on its chip, differentiable once.

A kernel runs forward and backward by two functions of arrays; what is known before anything runs is
one hashable value, `static`, whose first field names the chip. Under `vmap` a kernel runs once for
each element, one after the other: it fills a chip by itself.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
from jax.custom_batching import sequential_vmap

from attention import chips

_ABSENT = {"hopper": chips.not_hopper, "tpu": chips.not_tpu}


def module(name: str, chip: str) -> ModuleType:
  """`pallas_kernels/<name>_<chip>.py`, imported when it is asked for: one chip's compiler is no use
  on another.
  """
  return importlib.import_module(f"pallas_kernels.{name}_{chip}")


def unsupported(chip: str, arrays: Sequence[Any]) -> str | None:
  """Why no kernel for `chip` runs here on these arrays, or None."""
  if reason := _ABSENT[chip]():
    return reason
  if any(jax.typeof(x).manual_axis_type.varying for x in arrays):
    return "inside of shard_map it needs check_vma=False"
  return None


def differentiable_once(
  forward: Callable[..., Any], backward: Callable[..., Any], *, instead: str
) -> Callable[..., Any]:
  """The function (static, operands) -> results, with `backward` as its derivative.

  Args:
    forward: (static, operands) -> results.
    backward: (static, operands, results, gradients) -> the operands with gradients in their places,
      None where there is none.
    instead: what has derivatives of every order, for the error.
  """
  run = jax.custom_jvp(_one_by_one(forward), nondiff_argnums=(0,))
  pull = jax.custom_jvp(_one_by_one(backward), nondiff_argnums=(0,))

  @run.defjvp
  @pull.defjvp
  def no_second_derivative(static, primals, tangents):
    raise NotImplementedError(
      f"the {static.chip!r} kernel is differentiable once, its backward pass recomputes and saves "
      f"nothing; {instead}"
    )

  function = jax.custom_vjp(run, nondiff_argnums=(0,))

  def save(static, operands):
    results = run(static, operands)
    return results, (operands, results)

  function.defvjp(save, lambda static, saved, gradients: (pull(static, *saved, gradients),))
  return function


def _one_by_one(kernel: Callable[..., Any]) -> Callable[..., Any]:
  def run(static, *operands):
    return sequential_vmap(functools.partial(kernel, static))(*operands)

  return run
