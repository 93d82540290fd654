"""The gated recurrence on Hopper GPUs, interpreted, against its equation in float64."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
import scan_kit
from pallas_kernels import aot, linear_scan_hopper


@pytest.mark.parametrize("case", scan_kit.CASES, ids=str)
def test_tokens_channels_and_directions(case):
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    scan_kit.check_kernel(linear_scan_hopper, *case)


def test_gradients_and_vmap():
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    scan_kit.check_gradients("hopper")


@pytest.mark.parametrize("reverse", [False, True])
def test_lowers_for_the_chip(reverse):
  kit.needs_compiler("h200")
  x, state = jnp.ones((2, 300, 200)), jnp.ones((2, 200))
  run = functools.partial(linear_scan_hopper.scan, reverse=reverse)
  aot.lower_for(aot.CHIPS["h200"], jax.jit(run), x, x, state)
