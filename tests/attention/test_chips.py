"""Which chip: by the mesh in context, by the default device; the sentence when it is another."""

import types

import jax
import pytest

import kit
from attention import chips


def test_the_default_device():
  assert chips.current() == ("cpu", jax.devices()[0].device_kind)
  with jax.default_device(jax.devices()[3]):
    assert chips.current().platform == "cpu"


@pytest.mark.parametrize(
  ("kind", "platform", "hopper", "tpu", "ampere"),
  [
    ("NVIDIA H200", "cuda", True, False, True),
    ("NVIDIA H100 80GB HBM3", "cuda", True, False, True),
    ("NVIDIA GH200 480GB", "cuda", True, False, True),
    ("NVIDIA A100-SXM4-80GB", "cuda", False, False, True),
    ("NVIDIA B200", "cuda", False, False, True),
    ("NVIDIA RTX 6000 Ada Generation", "cuda", False, False, True),
    ("NVIDIA RTX 2000 Ada Generation", "cuda", False, False, True),
    ("NVIDIA GeForce RTX 3090 Ti", "cuda", False, False, True),
    ("NVIDIA GeForce RTX 2080 Ti", "cuda", False, False, False),
    ("NVIDIA TITAN V", "cuda", False, False, False),
    ("NVIDIA V100-SXM2-16GB", "cuda", False, False, False),
    ("NVIDIA T4", "cuda", False, False, False),
    ("AMD Instinct MI300X", "rocm", False, False, False),
    ("TPU v5 lite", "tpu", False, True, False),
    ("TPU7x", "tpu", False, True, False),
    ("TPU v3", "tpu", False, False, False),
  ],
)
def test_chips_are_told_apart(kind, platform, hopper, tpu, ampere):
  with kit.pretend(kind, platform):
    for reason, here in (
      (chips.not_hopper(), hopper),
      (chips.not_tpu(), tpu),
      (chips.not_ampere(), ampere),
    ):
      assert (reason is None) == here
      assert here or kind in reason


def test_a_core_for_each_device(monkeypatch):
  """Two cores: one device has both, and each of two has its own; another chip has no such cores."""
  monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
  assert not chips.has_one_core()
  with jax.set_mesh(jax.make_mesh((2,), ("x",))):
    assert chips.has_one_core()
  monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
  assert chips.has_one_core()
  with kit.pretend("TPU v5 lite", "tpu"):
    assert not chips.has_one_core()


@pytest.mark.parametrize(("capability", "here"), [("7.5", False), ("8.0", True), ("12.0", True)])
def test_a_device_that_is_here_says_what_it_can_do(capability, here, monkeypatch):
  device = types.SimpleNamespace(
    platform="cuda", device_kind="NVIDIA Graphics Device", compute_capability=capability
  )
  monkeypatch.setattr(chips, "_device", lambda: device)
  assert (chips.not_ampere() is None) == here
