"""Mamba-2's mixer against the recurrence of its paper in float64."""

import dataclasses

import mixer_kit as kit
import numpy as np
import pytest
from flax import nnx

from attention.modules.ssd import Mamba2
from attention.variants import parse


@pytest.mark.parametrize("groups", [None, 2])
def test_equals_the_recurrence(groups):
  config = dataclasses.replace(kit.CONFIG, num_kv_heads=groups)
  mixer, G = kit.make("mamba2", config=config), groups or 1

  def oracle(x):
    projections = (mixer.query, mixer.key, mixer.value)
    biases = (mixer.bias_q, mixer.bias_k, mixer.bias_v)
    C, B, X = (
      kit.silu(kit.convolved(kit.heads(x, w), conv.weight[...]) + kit.f64(bias[...]))
      for w, conv, bias in zip(projections, mixer.convolutions, biases, strict=True)
    )
    assert C.shape[1:] == B.shape[1:] == (G, 8) and X.shape[1:] == (4, 4)
    dt = kit.softplus(kit.heads(x, mixer.step_size) + kit.f64(mixer.dt_bias[...]))
    decay = np.exp(-np.exp(kit.f64(mixer.a_log[...])) * dt)
    y = kit.recurrence(C, B, dt[..., None] * X, decay[..., None])
    y = (y + kit.f64(mixer.skip[...])[:, None] * X) * kit.silu(kit.heads(x, mixer.gate))
    y = kit.rms_norm(y.reshape(len(x), G, -1), 1.0, epsilon=1e-5).reshape(y.shape)
    return kit.join(mixer, y * kit.f64(mixer.norm_scale[...]))

  kit.ask(mixer, oracle)


def test_begins_as_published():
  """Steps between 1e-3 and 0.1, A between 1 and 16, a skip of 1, four taps."""
  config = dataclasses.replace(kit.CONFIG, num_heads=64, num_kv_heads=1)
  mixer = Mamba2(config, parse("mamba2")[0], rngs=nnx.Rngs(0))
  dt, a = kit.softplus(kit.f64(mixer.dt_bias[...])), np.exp(kit.f64(mixer.a_log[...]))
  assert 9.9e-4 < dt.min() < 3e-3 and 0.03 < dt.max() < 0.101
  assert 1 <= a.min() < 2 and 14 < a.max() < 16.001
  assert np.all(np.asarray(mixer.skip[...]) == 1)
  assert [conv.weight.shape for conv in mixer.convolutions] == [(1, 4, 8), (1, 4, 8), (128, 4, 4)]
