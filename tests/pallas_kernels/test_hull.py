"""What the walks of both chips share."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import hull


class Walk(NamedTuple):
  """As little as a walk has."""

  node: jnp.ndarray
  going: jnp.ndarray


def test_a_walk_that_has_ended_stays_where_it_is():
  step = lambda going: hull.gone_on(
    Walk(jnp.int32(3), jnp.int32(going)), Walk(jnp.int32(7), jnp.int32(0))
  )
  assert step(1) == Walk(7, 0)
  assert step(0) == Walk(3, 0)
