"""Noise whose distribution is known."""

import jax
import jax.numpy as jnp
import numpy as np

from attention.gumbel import gumbel


def test_it_is_gumbels_and_of_no_correlation():
  """Mean, variance and quantiles; along keys, along queries, and on both sides of a query."""
  noise = jax.random.uniform(jax.random.key(0), (500,))
  distance = jnp.arange(-200, 200, dtype=jnp.int32)[None]
  g = np.asarray(jax.jit(gumbel)(noise, distance), np.float64)
  assert abs(g.mean() - np.euler_gamma) < 5 * np.pi / np.sqrt(6 * g.size)
  assert abs(g.var() / (np.pi**2 / 6) - 1) < 0.02
  below = [(np.exp(-np.exp(-g)) < u).mean() for u in (0.01, 0.3, 0.7, 0.99)]
  np.testing.assert_allclose(below, [0.01, 0.3, 0.7, 0.99], atol=5e-3)
  g = (g - g.mean()) / g.std()
  for a, b in ((g[:, 1:], g[:, :-1]), (g[1:], g[:-1]), (g[:, 1:200], g[:, :200:-1])):
    assert abs((a * b).mean()) < 5 / np.sqrt(a.size)


def test_it_depends_on_seed_and_distance_alone():
  noise = jnp.asarray([0.25, 0.75, 0.25])
  distance = jnp.asarray([[0, 1, 2], [0, 1, 2], [2, 0, 1]], jnp.int32)
  g = np.asarray(gumbel(noise, distance))
  np.testing.assert_array_equal(g[2], g[0, [2, 0, 1]])
  assert (g[0] != g[1]).all()


def test_the_greatest_draw_is_finite():
  """24 bits that are all set, and half a step more, are 1 in float32, whose noise is infinite."""
  g = gumbel(jnp.asarray([0.7433179616928101]), jnp.asarray([[2, 3]], jnp.int32))
  np.testing.assert_allclose(g[0, 0], -np.log(-np.log1p(-(2.0**-24))), rtol=1e-6)
  assert np.isfinite(g).all()
