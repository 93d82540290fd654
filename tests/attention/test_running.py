"""Running reductions against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.running import running


@pytest.mark.parametrize("T", [1, 2, 32, 64, 4096])
@pytest.mark.parametrize("reverse", [False, True])
def test_sums_and_an_operation_that_does_not_commute(T, reverse):
  x = np.random.default_rng(0).integers(0, 9, (T, 3)).astype(np.int32)
  turn = (lambda a: a[::-1]) if reverse else (lambda a: a)
  got = jax.jit(lambda x: running(jnp.add, x, reverse=reverse))(x)
  np.testing.assert_array_equal(got, turn(turn(x).cumsum(0)))

  def compose(f, g):  # x -> g(f(x)), f and g affine modulo 11
    return (f[0] * g[0] % 11, (f[1] * g[0] + g[1]) % 11)

  pairs = (jnp.asarray(x[:, 0]), jnp.asarray(x[:, 1]))
  got = jax.jit(lambda p: running(compose, p, reverse=reverse))(pairs)
  total, expected = None, []
  for pair in turn(x[:, :2].astype(int)):
    total = pair if total is None else compose(*((pair, total) if reverse else (total, pair)))
    expected.append(total)
  np.testing.assert_array_equal(np.stack(got, 1), turn(np.array(expected)))


def test_other_lengths_are_refused():
  with pytest.raises(ValueError, match="power of two, not 6"):
    running(jnp.add, jnp.ones(6))
