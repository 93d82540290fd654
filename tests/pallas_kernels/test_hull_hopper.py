"""Trees on Hopper GPUs, interpreted with a race detector: what they read is what the loops read."""

import functools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from attention import chips, hull
from pallas_kernels import aot

T = 24
FAMILIES = ("grid", "collinear")
"""Of integers: on a CPU compilers fuse what they like, and then the trees' rounding may differ."""


def _tokens(ties):
  """A state with room for less than T tokens, and streams of integers: ties of every kind."""
  q, k = zip(*(hardmax_kit.planar(family, T) for family in FAMILIES), strict=True)
  q, k = (np.stack(x, 1)[None] for x in (q, k))
  rng = np.random.default_rng(0)
  k[:, 9] = k[:, 4]  # the same keys again
  q[:, 7], q[:, 11] = 0.0, [3.0, 0.0]
  v = rng.integers(-50, 51, (1, T, len(FAMILIES), 2)).astype(np.float32)
  state = hull.init_state(
    1, num_heads=2 * len(FAMILIES), num_kv_heads=len(FAMILIES), value_dim=2, max_length=T - 2,
    ties=ties,
  )  # fmt: skip
  q = np.stack([q, -q], 3).reshape(1, T, -1, 2)
  return state, *(jnp.asarray(x) for x in (q, k, v))


@pytest.mark.parametrize("ties", ["average", "latest"])
def test_it_reads_what_the_loops_read(ties, monkeypatch):
  state, *tokens = _tokens(ties)
  lengths = jnp.array([T - 1], jnp.int32)
  expected = jax.jit(hull.prefill)(state, *tokens, lengths=lengths)
  monkeypatch.setattr(chips, "current", lambda: chips.Chip("gpu", "NVIDIA H200"))
  prefill = functools.partial(hull.prefill, implementation="hopper")
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    found = jax.jit(prefill)(state, *tokens, lengths=lengths)
  nobodys = {"nodes": 5, "entries": 3 * len(FAMILIES)}
  for name in ("used", "nodes", "entries", "extremes", "along_axes"):
    one, other = (np.asarray(getattr(x[0], name)) for x in (found, expected))
    end = one.shape[0] - nobodys.get(name, 0)
    kit.assert_same(name, one[:end], other[:end])
  kit.assert_same("out", found[1], expected[1])


def test_lowers_for_the_chip_and_writes_in_place():
  """A scan of steps copies no trees."""
  kit.needs_compiler("h200")
  state, *tokens = _tokens("average")
  prefill = functools.partial(hull.prefill, implementation="hopper")
  program = aot.compile_for(aot.CHIPS["h200"], prefill, state, *tokens).as_text()
  (turn,) = (part for part in program.split("\n\n") if "mosaic_gpu" in part)
  size = f"s32[{state.nodes.shape[0]}]"
  assert size in turn
  assert not [line for line in turn.splitlines() if " copy(" in line and size in line]
