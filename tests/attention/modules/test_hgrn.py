"""HGRN2's mixer against the recurrence of its paper in float64."""

import jax.numpy as jnp
import mixer_kit as kit
import numpy as np
import pytest

from attention.modules.hgrn import HGRN2


@pytest.mark.parametrize("layer", [0, 3])
def test_equals_the_recurrence(layer):
  mixer = kit.make("hgrn2", layer=layer)

  def oracle(x):
    q, logit, v = (kit.heads(x, w) for w in (mixer.query, mixer.key, mixer.value))
    bound = kit.sigmoid(kit.f64(mixer.bound[...])) if layer else 0.0
    forget = bound + (1 - bound) * kit.sigmoid(logit)
    out = kit.recurrence(kit.silu(q), 1 - forget, v, forget)
    return kit.join(mixer, kit.rms_norm(out, mixer.norm.scale[...], (-2, -1)))

  kit.ask(mixer, oracle)


def test_bounds_begin_at_the_layers_share_of_the_depth():
  from flax import nnx

  from attention.variants import parse

  for layer in range(1, 4):
    mixer = HGRN2(kit.CONFIG, parse("hgrn2")[0], layer=layer, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(kit.sigmoid(kit.f64(mixer.bound[...])), layer / 4, rtol=1e-6)


def test_a_gate_that_is_shut_or_open_is_exact():
  """f = 1 - 1e-18 rounds to 1, and 1 - f to 0; the logarithms keep both."""
  seen = {}

  def run(q, k, v, **inputs):
    seen.update(k=k, **inputs)
    return v

  logits = jnp.array([[40.0, -40.0, -1000.0, 1000.0]])
  HGRN2.around(run, logits, logits, logits)
  np.testing.assert_allclose(seen["k"], [[np.exp(-40), 1, 1, 0]], rtol=1e-6)
  np.testing.assert_allclose(seen["log_decay"], [[-np.exp(-40), -40, -1000, 0]], rtol=1e-6)
  logits, bound = np.float32([[[-40, -3, 0, 3, 10, 15, 20, 40]]]), np.float32([[1.5, 0] * 4])
  HGRN2.around(run, *(jnp.asarray(logits),) * 3, bound=jnp.asarray(bound))
  kept = kit.sigmoid(-kit.f64(bound)) * kit.sigmoid(-kit.f64(logits))
  np.testing.assert_allclose(seen["k"], kept, rtol=1e-6)
  np.testing.assert_allclose(seen["log_decay"], np.log1p(-kept), rtol=1e-6)
