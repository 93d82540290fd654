"""Hard-max attention on Hopper GPUs, interpreted, against a scan of all keys."""

import re

import hardmax_kit
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from pallas_kernels import hardmax_hopper


def interpreted():
  return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.parametrize("case", hardmax_kit.MASKS.values(), ids=hardmax_kit.MASKS)
def test_winners_means_and_gradients(case, monkeypatch):
  monkeypatch.setattr(hardmax_hopper, "BLOCK", (64, 128))
  with interpreted():
    hardmax_kit.check_kernel("hopper", *case)


def test_shared_heads():
  with interpreted():
    hardmax_kit.check_shared_heads("hopper")


@pytest.mark.parametrize("H", [1, 8])
def test_lowers_for_the_chip(H):
  kit.needs_compiler("h200")
  hardmax_kit.lowered("h200", H)


def test_no_product_is_fused_into_a_sum(tmp_path):
  """Each fused multiply-add of the machine's program adds 0, so that it is a product, rounded; and
  each sum stands alone.
  """
  hardmax_kit.compile_in_a_child("h200", tmp_path)
  (path,) = tmp_path.glob("hardmax_winners*.ptx")
  text = path.read_text()
  added = re.findall(r"\bfma\.\S*f32\s+[^;]*,\s*(\S+);", text)
  assert added and set(added) == {"0f00000000"}
  assert len(added) == 2 * len(re.findall(r"\badd\.(?:rn\.)?f32\b", text))
  assert not re.search(r"\bmul\.\S*f32\b|\.ftz\.", text)
