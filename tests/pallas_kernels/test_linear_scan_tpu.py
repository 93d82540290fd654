"""The gated recurrence on a TPU, interpreted, against its equation in float64."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

import kit
import scan_kit
from pallas_kernels import aot, linear_scan_tpu


@pytest.mark.parametrize("case", scan_kit.CASES, ids=str)
def test_tokens_channels_and_directions(case):
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    scan_kit.check_kernel(linear_scan_tpu, *case)


def test_gradients_and_vmap():
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    scan_kit.check_gradients("tpu")


@pytest.mark.parametrize("reverse", [False, True])
def test_lowers_for_the_chip(reverse):
  kit.needs_compiler("v5e")
  x, state = jnp.ones((2, 300, 200)), jnp.ones((2, 200))
  run = functools.partial(linear_scan_tpu.scan, reverse=reverse)
  aot.lower_for(aot.CHIPS["v5e"], jax.jit(run), x, x, state)
