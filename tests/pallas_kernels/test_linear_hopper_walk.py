"""The walk along the sequence: how it is cut, and what it does to the states of every chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from pallas_kernels import linear_hopper_walk, linear_tiles
from pallas_kernels.linear_hopper_walk import Inputs
from pallas_kernels.linear_tiles import CHUNK


@pytest.mark.parametrize(
  "M, h, states, parts, computers",
  [(128, 128, 96, 1, 2), (128, 128, 32, 1, 1), (128, 64, 96, 1, 1), (256, 256, 256, 1, 1),
   (64, 64, 1, 3, 2)],
)  # fmt: skip
def test_two_computers_only_where_blocks_remain_for_the_chip(M, h, states, parts, computers):
  assert linear_hopper_walk.plan(M, h, states, parts).warpgroups == computers


@pytest.mark.parametrize("reverse", [False, True])
def test_states_before_every_chunk(reverse):
  """Backward in time, tokens write as far as they read: the state fades from them to the chunk's
  first token.
  """
  make, C = kit.keys(), 3
  normal = lambda *shape, **dtype: kit.normal(next(make), *shape, **dtype)
  k, v = (normal(1, C * CHUNK, 1, 64, dtype="bfloat16") for _ in range(2))
  g = np.random.default_rng(0).uniform(-1 / 16, 0, (1, 1, C, CHUNK)).astype(np.float32)
  start = normal(1, 1, 64, 64)

  @jax.jit
  def walk(k, v, g, start):
    sums = linear_tiles.sums(g)
    numbers = jnp.stack([*sums[:4], *[jnp.zeros_like(g)] * 2], 3)
    fade = jnp.broadcast_to(sums.fade[..., None], (1, 1, C, 64))
    inputs = Inputs(None, (k,), (v,), numbers, fade, None, start)
    return linear_hopper_walk.walk(inputs, reverse=reverse, on_chip=False)

  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    found = jax.device_get(walk(k, v, g, start))
  start, k, v = (np.asarray(x, np.float64) for x in (start, k, v))
  state, total = start[0, 0], np.cumsum(np.asarray(g[0, 0], np.float64), 1)
  for c in reversed(range(C)) if reverse else range(C):
    kit.assert_close(f"before {c}", found.states[0][0, 0, c], state, "bfloat16")
    weight = np.exp2(total[c] if reverse else total[c, -1] - total[c])[:, None]
    rows = slice(c * CHUNK, (c + 1) * CHUNK)
    k_c, v_c = (x[0, rows, 0] for x in (k, v))
    state = np.exp2(total[c, -1]) * state + k_c.T @ (weight * v_c)
  kit.assert_close("last", found.last[0, 0], state, "bfloat16")
