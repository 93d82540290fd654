"""Running reductions of long arrays as loops over short ones: what XLA compiles in a moment.

    out[t] = x[0] + x[1] + ... + x[t],     + any associative operation

`lax.associative_scan` unrolls 2 log T shapes into the program, seconds to compile each; this is a
loop of a few steps over many lanes, and another one over what the lanes add up to.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_STEPS = 32


def running(add: Callable[[Any, Any], Any], x: Any, *, reverse: bool = False) -> Any:
  """Along the first axis of every array in `x`, whose length is a power of two: sums from the first
  element on, or with `reverse` down from the last.

  `add(earlier, later)` takes trees like `x`, elementwise along that axis.
  """
  T = jax.tree.leaves(x)[0].shape[0]
  if T & (T - 1):
    raise ValueError(f"the length must be a power of two, not {T}")
  steps = min(T, _STEPS)
  lanes = T // steps

  def step(total, new):
    total = add(new, total) if reverse else add(total, new)
    return total, total

  last = 0 if reverse else -1
  by_step = jax.tree.map(lambda x: x.reshape(lanes, steps, *x.shape[1:]).swapaxes(0, 1), x)
  own, rest = (slice(-1, None), slice(None, -1)) if reverse else (slice(1), slice(1, None))
  start = jax.tree.map(lambda x: x[own], by_step)
  carry = jax.tree.map(lambda x: x[0], start)
  _, after = lax.scan(step, carry, jax.tree.map(lambda x: x[rest], by_step), reverse=reverse)
  parts = (lambda a, b: (b, a)) if reverse else (lambda a, b: (a, b))
  inside = jax.tree.map(lambda a, b: jnp.concatenate(parts(a, b)), start, after)
  if lanes > 1:
    ends = running(add, jax.tree.map(lambda x: x[last], inside), reverse=reverse)
    # Before a lane lie the sums that end with its neighbor. The lane at the end has none.
    own, next_to = (
      (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    )
    rest = jax.tree.map(lambda x: x[:, own], inside)
    before = jax.tree.map(lambda x, y: jnp.broadcast_to(x[None, next_to], y.shape), ends, rest)
    joined = add(rest, before) if reverse else add(before, rest)
    alone = jax.tree.map(lambda x: x[:, -1:] if reverse else x[:, :1], inside)
    inside = jax.tree.map(lambda a, b: jnp.concatenate(parts(a, b), axis=1), alone, joined)
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(T, *x.shape[2:]), inside)
