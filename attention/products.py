"""Products of many small matrices, [... rows columns], and their gradients.

    x y        x y^T        x^T y

Each one's gradients are products of the three again. Of x^T y, which sums over the rows of both,
XLA's CPU compiler makes a product for one core, whatever is written: it moves every transpose into
the product. A barrier keeps it out, and the copy costs less than the other cores give
(BUILD_NOTES.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention import chips


def times(
  x: Float[Array, "*n i k"], y: Float[Array, "*n k j"], precision: lax.Precision | None = None
) -> Float[Array, "*n i j"]:
  """x y."""
  return _product("ik,kj", precision, x, y)


def times_transposed(
  x: Float[Array, "*n i k"], y: Float[Array, "*n j k"], precision: lax.Precision | None = None
) -> Float[Array, "*n i j"]:
  """x y^T."""
  return _product("ik,jk", precision, x, y)


def transposed_times(
  x: Float[Array, "*n k i"], y: Float[Array, "*n k j"], precision: lax.Precision | None = None
) -> Float[Array, "*n i j"]:
  """x^T y."""
  return _product("ki,kj", precision, x, y)


@jax.custom_jvp
def settled(x: jax.Array) -> jax.Array:
  """x, on a CPU as an array of its own: XLA moves no transpose past it, from either side."""
  return lax.optimization_barrier(x) if chips.current().platform == "cpu" else x


@settled.defjvp
def _settled_derivative(primals, tangents):
  return settled(*primals), *tangents


def _product(form, precision, x, y):
  product = _on_cpu if chips.current().platform == "cpu" else _plain
  return product(form, precision, x, y)


def _plain(form, precision, x, y):
  x_axes, y_axes = form.split(",")
  return jnp.einsum(f"...{x_axes},...{y_axes}->...ij", x, y, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_cpu(form, precision, x, y):
  if form == "ki,kj":
    return _plain("ik,kj", precision, settled(jnp.swapaxes(x, -1, -2)), y)
  return _plain(form, precision, x, y)


def _forward(form, precision, x, y):
  return _on_cpu(form, precision, x, y), (x, y)


def _backward(form, precision, saved, d):
  x, y = saved
  if form == "ik,kj":
    return times_transposed(d, y, precision), transposed_times(x, d, precision)
  if form == "ik,jk":
    return times(d, y, precision), transposed_times(d, x, precision)
  return times_transposed(y, d, precision), times(x, d, precision)


_on_cpu.defvjp(_forward, _backward)
