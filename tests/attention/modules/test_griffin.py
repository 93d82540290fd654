"""Griffin's recurrent block against the equations of its paper in float64."""

import jax
import jax.numpy as jnp
import mixer_kit as kit
import numpy as np
from flax import nnx

from attention.modules.griffin import RecurrentBlock, write_strength
from attention.variants import parse


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_equals_the_recurrence():
  mixer = kit.make("rglru")

  def oracle(x):
    value = kit.heads(x, mixer.value)
    (conv,) = mixer.convolutions
    y = kit.convolved(value, conv.weight[...]) + kit.f64(mixer.bias_x[...])
    gate = lambda w, b: kit.sigmoid(np.einsum("tnh,nhm->tnm", y, kit.f64(w[...])) + kit.f64(b[...]))
    r, i = gate(mixer.gate_a, mixer.bias_a), gate(mixer.gate_i, mixer.bias_i)
    a = np.exp(-8 * kit.softplus(kit.f64(mixer.rate[...])) * r)
    h, out = np.zeros_like(y[0]), np.zeros_like(y)
    for t in range(len(x)):
      out[t] = h = a[t] * h + np.sqrt(1 - a[t] ** 2) * i[t] * y[t]
    return kit.join(mixer, gelu(kit.heads(x, mixer.query)) * out)

  kit.ask(mixer, oracle)


def test_decays_begin_uniform_between_the_radii():
  mixer = RecurrentBlock(kit.CONFIG, parse("rglru")[0], rngs=nnx.Rngs(0))
  kept = np.exp(-8 * kit.softplus(kit.f64(mixer.rate[...])))
  assert np.all((kept > 0.8999) & (kept < 0.9991)) and kept.std() > 0.01


def test_the_write_is_finite_where_nothing_is_forgotten_and_where_all_is():
  log_a = jnp.array([0.0, -1e-30, -1e-9, -1e-3, -1.0, -1e4, -jnp.inf])
  value, slope = jax.vmap(jax.value_and_grad(write_strength))(log_a)
  want = np.sqrt(-np.expm1(2 * np.asarray(log_a, np.float64)))
  np.testing.assert_allclose(value, want, atol=6e-4)
  np.testing.assert_allclose(value[3:], want[3:], rtol=1e-5)
  assert np.isfinite(np.asarray(slope)).all()
