"""Decays per channel inside a chunk: the scores of every pair against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from pallas_kernels import linear_hopper_channel
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
