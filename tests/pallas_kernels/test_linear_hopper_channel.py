"""Decays per channel inside a chunk: the scores of every pair against sums in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from pallas_kernels import hopper, linear_hopper_channel
from pallas_kernels.linear_tiles import CHUNK


@pytest.mark.parametrize("harsh", [False, True])
def test_faded_operands(harsh):
  make, T = kit.keys(), CHUNK + 8
  q, k = (jax.random.normal(next(make), (1, T, 1, 128)).astype(jnp.bfloat16) for _ in range(2))
  g = -jax.random.uniform(next(make), (1, 2 * CHUNK, 1, 128)) / 4
  if harsh:
    choices = jnp.array([0.0, -1e-3, -30.0, -128.0])
    g = jnp.where(jax.random.bernoulli(next(make), 0.1, g.shape),
                  jax.random.choice(next(make), choices, g.shape), g)  # fmt: skip
  scale = jax.random.uniform(next(make), (1, 1, 2, CHUNK))
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    found = linear_hopper_channel.fade((q,), (k,), g, scale, on_chip=False)
  (faded_q,), (faded_k,), (pairs_found,) = found
  q, k, g = (np.asarray(x[0, :CHUNK, 0], np.float64) for x in (q, k, g))
  total = np.cumsum(g, 0)
  kit.assert_close("q", faded_q[0, :CHUNK, 0], q * np.exp(total), "bfloat16")
  kit.assert_close("k", faded_k[0, :CHUNK, 0], k * np.exp(total[-1] - total), "bfloat16")
  pairs = np.zeros((CHUNK, CHUNK))
  for i in range(CHUNK):
    for j in range(i + 1):
      pairs[i, j] = (q[i] * k[j] * np.exp(g[j + 1 : i + 1].sum(0))).sum()
  kit.assert_close(
    "pairs", pairs_found[0, 0, 0], np.asarray(scale)[0, 0, 0][:, None] * pairs, "bfloat16"
  )


def test_cuda_has_the_grids_of_long_texts(monkeypatch):
  """Its first axis, the grid's last, may have any length; the others 65535."""
  grids = []

  def launch_alone(name, body, grid, out_type, scratch=()):
    grids.append(tuple(grid.values()))
    return lambda *given: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

  monkeypatch.setattr(hopper, "launch_alone", launch_alone)
  T = 2**23
  x = jax.ShapeDtypeStruct((2, T, 1, 256), jnp.bfloat16)
  g = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  given = linear_hopper_channel.Unfade(x, x, x, x, None, None, g, None)
  run = functools.partial(linear_hopper_channel.fade, on_chip=True)
  jax.eval_shape(run, (x,), (x,), g, None)
  jax.eval_shape(functools.partial(linear_hopper_channel.unfade, on_chip=True), given)
  assert grids == [(1, 2, T // CHUNK), (4, 1, 2, T // CHUNK)]
