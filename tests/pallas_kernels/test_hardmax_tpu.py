"""Hard-max attention on a TPU, interpreted, against a scan of all keys."""

import re

import hardmax_kit
import pytest
from jax.experimental.pallas import tpu as pltpu

import kit
from pallas_kernels import hardmax_tpu


def interpreted():
  return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))


@pytest.mark.parametrize("case", hardmax_kit.MASKS.values(), ids=hardmax_kit.MASKS)
def test_winners_means_and_gradients(case, monkeypatch):
  monkeypatch.setattr(hardmax_tpu, "BLOCK", (128, 128))
  with interpreted():
    hardmax_kit.check_kernel("tpu", *case)


def test_shared_heads():
  with interpreted():
    hardmax_kit.check_shared_heads("tpu")


@pytest.mark.parametrize("H", [1, 8])
def test_lowers_for_the_chip(H):
  kit.needs_compiler("v5e")
  hardmax_kit.lowered("v5e", H)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_no_product_is_fused_into_a_sum(tmp_path, chip):
  """A score of the chip's program is two products and a sum, and nothing else is of their kind."""
  hardmax_kit.compile_in_a_child(chip, tmp_path)
  (path,) = tmp_path.glob("*-hardmax_winners*-[0-9]*-final_bundles.txt")
  names = re.findall(r"= *(v\S*f32\S*)", path.read_text())
  of = {kind: [name for name in names if kind in name] for kind in ("mul", "add", "fma", "mac")}
  assert of["mul"] and len(of["mul"]) == 2 * len(of["add"])
  assert not of["fma"] and not of["mac"]


def test_what_it_refuses():
  assert hardmax_tpu.unsupported(1000, 1000, 8) is None
  assert hardmax_tpu.unsupported(1000, 1000, 9) == "head_dim 9 is more than 8"
  assert "T=1048576 and S=1048576 are more blocks" in str(hardmax_tpu.unsupported(2**20, 2**20, 2))
