"""A gated recurrence for the kernels of both chips, and its equation in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

import kit
from attention.ops import linear_scan
from attention.ops.linear_scan import Walk

CASES = [(1, 40, 128, False), (2, 33, 130, True), (1, 1, 3, False), (1, 300, 5, True)]
"""Batch, tokens, channels, whether in reverse."""


def inputs(B, T, D):
  """log_a with resets, zeros and harsh decays side by side, b, state."""
  rng = np.random.default_rng(T)
  mild = -np.exp(2 * rng.standard_normal((B, T, D)) - 2)
  harsh = rng.choice([-np.inf, -1e4, -1e-3, 0.0, -30.0], mild.shape)
  log_a = np.where(rng.random(mild.shape) < 0.2, harsh, mild)
  return [
    jnp.asarray(x, jnp.float32)
    for x in (log_a, rng.standard_normal(mild.shape), rng.standard_normal((B, D)))
  ]


def loop(log_a, b, state, *, reverse):
  """x, token by token, in float64."""
  log_a, b, x = (np.asarray(each, np.float64) for each in (log_a, b, state))
  out, order = np.zeros_like(b), range(b.shape[1])
  for t in reversed(order) if reverse else order:
    x = np.exp(log_a[:, t]) * x + b[:, t]
    out[:, t] = x
  return out


def check_kernel(kernel, B, T, D, reverse):
  """The kernel's x against the equation."""
  given = inputs(B, T, D)
  x = jax.jit(lambda *given: kernel.scan(*given, reverse=reverse))(*given)
  kit.assert_close("x", x, loop(*given, reverse=reverse))


def check_gradients(chip):
  """Through x and through the state, of a batch under vmap as well, against the other form."""
  given = inputs(1, 37, 4)
  weights = jnp.cos(jnp.arange(37 * 4.0)).reshape(1, 37, 4)

  def gradients(chip, reverse):
    run = lambda *given: jnp.sum(linear_scan.scan(Walk(chip, reverse), *given) * weights)
    return jax.jit(jax.grad(run, (0, 1, 2)))(*given)

  for reverse in (False, True):
    kit.assert_trees_close(gradients(chip, reverse), gradients(None, reverse))
  many = [jnp.stack([x, 2 * x]) for x in given]
  both = jax.jit(jax.vmap(lambda *one: linear_scan.scan(Walk(chip, False), *one)))(*many)
  kit.assert_close("vmap", both[1], loop(*(x[1] for x in many), reverse=False))
