"""RetNet's and Lightning's mixers against the recurrences of their papers in float64."""

import mixer_kit as kit
import numpy as np

from attention.modules.retention import lightning_decay, retention_decay


def turn(x):
  """Rotary by complex numbers: channel c and c + H/2 are one number."""
  half = x.shape[-1] // 2
  angle = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], axis=-1)


def test_retention_is_the_recurrence_of_the_paper():
  mixer = kit.make("retnet")

  def oracle(x):
    q, k, v = (
      turn(kit.heads(x, mixer.query)),
      turn(kit.heads(x, mixer.key)),
      kit.heads(x, mixer.value),
    )
    assert v.shape[-1] == 2 * q.shape[-1]
    decay = np.broadcast_to((1 - 2.0 ** np.array([-5, -6]))[None, :, None], (len(x), 2, 1))
    out = kit.rms_norm(kit.recurrence(q, k / 2, v, decay), mixer.norm.scale[...])
    return kit.join(mixer, kit.silu(kit.heads(x, mixer.gate)) * out)

  kit.ask(mixer, oracle)


def test_lightning_is_the_recurrence_of_the_paper():
  mixer = kit.make("lightning", layer=1)

  def oracle(x):
    q, k, v = (kit.silu(kit.heads(x, w)) for w in (mixer.query, mixer.key, mixer.value))
    slopes = np.array([0, 8 / 2 * (1 - 1 / 4)])
    decay = np.broadcast_to(np.exp(-slopes)[None, :, None], (len(x), 2, 1))
    out = kit.rms_norm(kit.recurrence(q, k, v, decay), mixer.norm.scale[...], (-2, -1))
    return kit.join(mixer, kit.sigmoid(kit.heads(x, mixer.gate)) * out)

  kit.ask(mixer, oracle)


def test_decays_keep_their_digits_and_differ_by_head_and_layer():
  many = np.asarray(retention_decay(20), np.float64)
  np.testing.assert_allclose(many, np.log1p(-(2.0 ** -(5.0 + np.arange(20)))), rtol=1e-6)
  assert np.all(many < 0)
  first, last = (np.asarray(lightning_decay(8, layer, 4)) for layer in (0, 3))
  np.testing.assert_allclose(first, -np.arange(8))
  np.testing.assert_allclose(last, -np.arange(8) / 4)
