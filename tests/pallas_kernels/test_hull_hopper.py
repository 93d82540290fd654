"""Trees on Hopper GPUs, interpreted with a race detector: what they read is what the loops read."""

import hardmax_kit
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from attention import chips


@pytest.mark.parametrize("ties", ["average", "latest"])
def test_it_reads_what_the_loops_read(ties, monkeypatch):
  monkeypatch.setattr(chips, "current", lambda: chips.Chip("gpu", "NVIDIA H200"))
  interpreted = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
  hardmax_kit.check_hull("hopper", ties, 24, interpreted)


def test_lowers_for_the_chip_and_writes_in_place(monkeypatch):
  kit.needs_compiler("h200")
  monkeypatch.setattr(chips, "current", lambda: chips.Chip("gpu", "NVIDIA H200"))
  hardmax_kit.check_in_place("h200", "hopper")
