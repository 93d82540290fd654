"""The gradients of a chunk: a run of chunks that is longer than what one block takes."""

from jax.experimental.pallas import mosaic_gpu as plgpu

import linear_kit
from linear_kit import Problem
from pallas_kernels import linear_hopper, linear_hopper_chunk
from pallas_kernels.linear_tiles import CHUNK


def test_chunks_in_more_than_one_block(monkeypatch):
  """The last run is short."""
  monkeypatch.setattr(linear_hopper_chunk, "SPAN", 2)
  problem = Problem(T=2 * CHUNK + 9, B=1, Nq=1, K=1, Kv=1, dtype="bfloat16", harsh=True)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    linear_kit.check(linear_hopper, problem, on_chip=False)
