"""The gated mixers against the recurrence in float64."""

import jax
import jax.numpy as jnp
import mixer_kit as kit
import numpy as np


def test_equals_the_recurrence():
  mixer = kit.make("gated_linear")

  def oracle(x):
    q, k, v = (kit.heads(x, w) for w in (mixer.query, mixer.key, mixer.value))
    assert q.shape[-1] == k.shape[-1] == 2 and v.shape[-1] == 4
    low = x @ kit.f64(mixer.decay_down.kernel[...])
    assert low.shape[-1] == 16
    logit = kit.heads(low, mixer.decay_up) + kit.f64(mixer.decay_bias[...])
    out = kit.recurrence(q / np.sqrt(2), k, v, kit.sigmoid(logit) ** (1 / 16))
    out = kit.rms_norm(out, mixer.norm.scale[...])
    return kit.join(mixer, kit.silu(kit.heads(x, mixer.gate)) * out)

  kit.ask(mixer, oracle)


def test_decays_are_never_positive():
  x = 1e4 * jax.random.normal(jax.random.key(2), (2, 7, 12))
  decay = kit.make("gated_linear").inputs(x.astype(jnp.bfloat16))["log_decay"]
  assert decay.shape == (2, 7, 2, 2)
  assert decay.dtype == jnp.float32
  assert np.isfinite(decay).all()
  assert (decay <= 0).all()
