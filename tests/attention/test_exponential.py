"""Our e^x against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import kit
from attention import chips
from attention.exponential import exp


def ulps(x: np.ndarray) -> np.ndarray:
  """By how many units in the last place e^x is missed."""
  true = np.exp(x.astype(np.float64))
  return np.abs(np.asarray(jax.jit(exp)(x), np.float64) - true) / np.spacing(
    true.astype(np.float32)
  )


def test_it_is_exact_to_about_the_last_place():
  x = np.concatenate(
    [np.linspace(0, 1, 200_001), np.linspace(0, 87.3, 200_001), np.logspace(-30, 0)]
  )
  assert ulps(-x.astype(np.float32)).max() < 1.3
  assert ulps(np.linspace(0, 87, 10_001).astype(np.float32)).max() < 1.3


def test_ends():
  """What is masked is exactly 0, and what is the maximum exactly 1."""
  x = jnp.array([0.0, -0.0, -1e-30, -88.0, -1e4, -3e38, -jnp.inf, jnp.nan])
  np.testing.assert_array_equal(exp(x), [1, 1, 1, 0, 0, 0, 0, np.nan])


def test_its_derivatives_are_itself():
  x = jnp.array([-0.3, -5.0, -100.0, -jnp.inf])
  first = jax.vmap(jax.grad(exp))(x)
  np.testing.assert_array_equal(first, exp(x))
  np.testing.assert_array_equal(jax.vmap(jax.grad(jax.grad(exp)))(x), exp(x))


def test_elsewhere_it_is_that_of_jax(monkeypatch):
  x = kit.normal(jax.random.key(0), 7)
  with kit.double():
    assert exp(kit.to_double(x)).dtype == jnp.float64
  text = lambda: jax.jit(lambda x: exp(x)).lower(x).as_text()  # a new function is traced anew
  assert "exponential" not in text()
  monkeypatch.setattr(chips, "current", lambda: chips.Chip("tpu", "TPU v5 lite"))
  assert "exponential" in text()
