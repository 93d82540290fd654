"""What the decays of a chunk add up to, in float64, where plain running sums lose digits."""

import jax
import jax.numpy as jnp
import numpy as np

import kit
from pallas_kernels import linear_tiles
from pallas_kernels.linear_tiles import CHUNK


def _decays(seed=0):
  """-128, -30, -1e-3 and 0 side by side, `B N C CHUNK`."""
  choices = jnp.array([0.0, -1e-3, -30.0, -128.0, -0.5])
  return jax.random.choice(jax.random.key(seed), choices, (1, 2, 2, CHUNK))


def test_a_running_sum_in_two_floats_has_the_digits_of_small_decays_behind_large_ones():
  g = _decays()
  hi, lo = jax.jit(linear_tiles.running_sum)(g)
  between = (hi[..., :, None] - hi[..., None, :]) + (lo[..., :, None] - lo[..., None, :])
  exact = np.cumsum(np.asarray(g, np.float64), -1)
  want = exact[..., :, None] - exact[..., None, :]
  later = np.tri(CHUNK, dtype=bool)
  np.testing.assert_allclose(
    np.asarray(between)[..., later], want[..., later], rtol=3e-7, atol=1e-9
  )
  plain = np.asarray(jnp.cumsum(g, -1))
  lost = np.abs((plain[..., :, None] - plain[..., None, :] - want)[..., later]).max()
  assert lost > 1e-5, "these decays would not have shown it"


def test_sums_of_a_chunk():
  g = np.asarray(_decays())[0, :, 0].T[None, :50]
  g = jax.jit(linear_tiles.per_token, static_argnums=(1, 2, 3))(g, 1, 50, 2)
  assert g.shape == (1, 2, 1, CHUNK) and not np.asarray(g[..., 50:]).any()
  found, exact = jax.jit(linear_tiles.sums)(g), np.asarray(g, np.float64)
  total = np.cumsum(exact, -1)
  kit.assert_close("read", found.read, np.exp2(total))
  kit.assert_close("write", found.write, np.exp2(total[..., -1:] - total))
  kit.assert_close("fade", found.fade, np.exp2(total[..., -1]))


def test_a_walk_is_its_recurrence_in_both_directions():
  make = kit.keys()
  fade, add = (jax.random.uniform(next(make), (1, 2, 5, 3)) for _ in range(2))
  start = jax.random.normal(next(make), (1, 2, 3))
  for reverse in (False, True):
    before, last = linear_tiles.walk(fade, add, start, reverse=reverse)
    z = np.asarray(start, np.float64)
    for c in reversed(range(5)) if reverse else range(5):
      kit.assert_close(f"before {c}", before[:, :, c], z)
      z = np.asarray(fade[:, :, c], np.float64) * z + np.asarray(add[:, :, c])
    kit.assert_close("last", last, z)


def test_the_gradient_of_a_decay_is_what_crosses_it():
  """Pairs, reads and writes by loops."""
  make = np.random.default_rng(0)
  pairs = np.tril(make.normal(size=(CHUNK, CHUNK)), -1)
  read, write, fade = make.normal(size=CHUNK), make.normal(size=CHUNK), make.normal()
  want = [pairs[l:, :l].sum() + read[l:].sum() + write[:l].sum() + fade for l in range(CHUNK)]
  parts = (pairs.sum(1) + read, pairs.sum(0), write, np.asarray(fade))
  got = linear_tiles.d_token(*(jnp.asarray(x, jnp.float32)[None, None, None] for x in parts))
  kit.assert_close("dg", got[0, 0, 0], want)


def test_gradients_of_shared_heads_are_summed():
  x = jnp.arange(24, dtype=jnp.float32).reshape(1, 1, 4, 6)
  np.testing.assert_array_equal(
    linear_tiles.grouped(x, 2)[0, 0], [x[0, 0, :2].sum(0), x[0, 0, 2:].sum(0)]
  )
