"""How sharp is sharp enough, against the softmax itself."""

import jax
import numpy as np
import pytest

from attention import annealing


def test_annealing_ends_where_the_margin_says():
  """At `sharpness` the softmax misses hard-max by less than the error, and not by far less."""
  margin, S = 0.5, 200
  beta = annealing.sharpness(S, margin, 1e-3)
  scores = np.full(S, -margin)
  scores[7] = 0.0  # the worst case: all others at the margin
  tail = 1 - 1 / np.exp(beta * scores).sum()
  assert 0.99e-3 < tail <= 1e-3
  betas = [float(annealing.harden(i, 10, start=1.0, end=beta)) for i in (0, 5, 10, 20)]
  np.testing.assert_allclose(betas, [1.0, beta**0.5, beta, beta], rtol=1e-6)
  with pytest.raises(ValueError, match="margin must be greater than 0, not 0"):
    annealing.sharpness(S, 0, 1e-3)


def test_what_is_out_of_range_is_refused_and_what_is_traced_is_not():
  for given, says in (
    ({"steps": 0}, "steps must be greater than 0, not 0"),
    ({"start": 0.0}, "start must be greater than 0, not 0.0"),
    ({"end": -1.0}, "end must be greater than 0, not -1.0"),
  ):
    with pytest.raises(ValueError, match=says):
      annealing.harden(0, **{"steps": 10, "end": 2.0} | given)
  with pytest.raises(ValueError, match="error must be less than 1, not 2.0"):
    annealing.sharpness(2, 1.0, 2.0)
  beta = jax.jit(lambda step, end: annealing.harden(step, 4, end=end))(2, 9.0)
  np.testing.assert_allclose(beta, 3.0, rtol=1e-6)
