"""What the tests share: tolerances, random inputs, comparisons that name what differs, oracles in
float64.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot


def needs_compiler(chip: str) -> None:
  """Skips the test where nothing can be compiled for a chip; fails it where REQUIRE_COMPILERS is
  set, as where CI has installed them.
  """
  if why := aot.missing(aot.CHIPS[chip]):
    stop = pytest.fail if "REQUIRE_COMPILERS" in os.environ else pytest.skip
    stop(f"nothing can be compiled for {chip}: {why}")


class Tolerance(NamedTuple):
  """Errors relative to the size of the expected array: the worst element, and the root mean
  square.
  """

  worst: float
  rms: float


# The one table of tolerances. bfloat16 has 8 bits: rounding an output once costs 2^-9 = 0.002 of
# its own size.
TOLERANCE: Mapping[str, Tolerance] = {
  "float64": Tolerance(1e-12, 1e-13),
  "float32": Tolerance(1e-5, 2e-6),
  "bfloat16": Tolerance(2e-2, 6e-3),
}


def assert_close(
  name: str, actual, expected, dtype="float32", *, factor: float = 1.0, least: float = 0.0
) -> None:
  """Fails with the name, the place and both values where `actual` is not `expected`.

  Infinities must be equal. `factor` widens the table where a quantity is a sum of many terms that
  cancel; `least` is the size of those terms, for where they may cancel to nothing. The caller says
  why.
  """
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
  finite = np.isfinite(expected)
  same = actual[~finite] == expected[~finite]
  assert same.all(), f"{name}: {actual[~finite][~same][:3]} where {expected[~finite][~same][:3]}"
  actual, expected = actual[finite], expected[finite]
  assert np.isfinite(actual).all(), f"{name}: {np.count_nonzero(~np.isfinite(actual))} not finite"
  if not actual.size:
    return
  error, size = np.abs(actual - expected), max(np.abs(expected).max(), least)
  worst = int(error.argmax())
  limit = TOLERANCE[jnp.dtype(dtype).name]
  message = (
    f"{name}: {actual[worst]} where {expected[worst]}, off by {error[worst]:.3g} of {size:.3g}"
  )
  assert error[worst] <= factor * limit.worst * size, message
  rms = max(np.sqrt((expected**2).mean()), least)
  ratio = np.sqrt((error**2).mean()) / rms if rms else 0.0
  assert ratio <= factor * limit.rms, f"{message}; relative RMSE {ratio:.3g}"


def assert_trees_close(
  actual, expected, dtype="float32", *, factor: float = 1.0, least: float = 0.0
) -> None:
  """`assert_close` of every leaf, named by its path."""
  paths, tree = jax.tree_util.tree_flatten_with_path(expected)
  leaves = jax.tree.leaves(actual)
  assert jax.tree.structure(actual) == tree
  for (path, want), got in zip(paths, leaves, strict=True):
    assert_close(jax.tree_util.keystr(path), got, want, dtype, factor=factor, least=least)


def assert_same(name: str, actual, expected) -> None:
  """Equal bit for bit."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
  differ = actual.tobytes() != expected.tobytes()
  assert not differ, f"{name}: {np.count_nonzero(actual != expected)} of {actual.size} differ"


def keys(seed: int = 0) -> Iterator[jax.Array]:
  """Fresh random keys, without end."""
  key = jax.random.key(seed)
  while True:
    key, one = jax.random.split(key)
    yield one


def normal(key: jax.Array, *shape: int, dtype: str = "float32") -> jax.Array:
  """`jax.random.normal`, number for number, and no program compiled for each shape.

  Threefry's numbers depend on their index alone, so a short draw is the beginning of a long one;
  NumPy cuts, shapes and rounds it.
  """
  size = math.prod(shape)
  drawn = jax.random.normal(key, (max(4096, 1 << (size - 1).bit_length()),), jnp.float32)
  return jax.device_put(np.asarray(drawn)[:size].reshape(shape).astype(jnp.dtype(dtype)))


def compiled(function: Callable) -> Callable:
  """`function` as one program, not an operation at a time; options without arrays are static."""

  @functools.partial(jax.jit, static_argnums=0)
  def run(static, arrays, traced):
    return function(*arrays, **traced, **dict(static))

  @functools.wraps(function)
  def call(*arrays, **options):
    traced = {
      name: x
      for name, x in options.items()
      if any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(x))
    }
    static = tuple((name, x) for name, x in options.items() if name not in traced)
    return run(static, arrays, traced)

  return call


class Case(NamedTuple):
  """The shapes of one attention call."""

  B: int = 2
  T: int = 33
  S: int = 33
  N: int = 4
  K: int = 2
  H: int = 8
  h: int = 8
  dtype: str = "float32"

  def __str__(self):
    return "-".join(f"{name}{value}" for name, value in zip(self._fields, self, strict=True))

  def inputs(self, seed: int = 0, dtype: str | None = None):
    """q, k, v of this case."""
    make, dtype = keys(seed), dtype or self.dtype
    shapes = ((self.T, self.N, self.H), (self.S, self.K, self.H), (self.S, self.K, self.h))
    return tuple(normal(next(make), self.B, *shape, dtype=dtype) for shape in shapes)


@contextlib.contextmanager
def double():
  """float64 inside."""
  with jax.enable_x64(True):
    yield


def pretend(kind: str, platform: str):
  """A context in which programs are made for a chip that is not here."""
  device = jax.sharding.AbstractDevice(kind, 132, platform)
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def to_double(tree):
  """Floating leaves as float64 (inside `double`)."""
  return jax.tree.map(
    lambda x: (
      jax.device_put(np.asarray(x, np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else x
    ),
    tree,
  )


def softmax_attention(q, k, v, allowed, *, bias=0.0, scale=None, cap=None, slopes=None, sinks=None):
  """Softmax attention in NumPy, float64, one query and head at a time: (out `B T N h`, lse `B T
  N`).
  """
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  slopes, sinks = (x if x is None else np.asarray(x, np.float64) for x in (slopes, sinks))
  (B, T, N, H), (S, K, h) = q.shape, v.shape[1:]
  allowed = np.broadcast_to(np.asarray(allowed), (B, N, T, S))
  bias = np.broadcast_to(np.asarray(bias, np.float64), (B, N, T, S))
  out, lse = np.zeros((B, T, N, h)), np.full((B, T, N), -np.inf)
  for b, t, n in np.ndindex(B, T, N):
    s = k[b, :, n // (N // K)] @ q[b, t, n] * (H**-0.5 if scale is None else scale)
    s = s if cap is None else cap * np.tanh(s / cap)
    s = s + bias[b, n, t] - (0.0 if slopes is None else slopes[n]) * np.abs(np.arange(S) - t)
    s = np.where(allowed[b, n, t], s, -np.inf)
    everything = s if sinks is None else np.append(s, sinks[n])
    if everything.max() > -np.inf:
      lse[b, t, n] = everything.max() + np.log(np.exp(everything - everything.max()).sum())
      out[b, t, n] = np.exp(s - lse[b, t, n]) @ v[b, :, n // (N // K)]
  return out, lse
