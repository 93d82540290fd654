"""What hard-max kernels share."""

import jax.numpy as jnp
import numpy as np

import kit
from pallas_kernels import hardmax


def test_scores_are_sums_of_rounded_products():
  make = kit.keys()
  q, k = kit.normal(next(make), 3, 40), kit.normal(next(make), 3, 40)
  a, b = (np.asarray(x) for x in (q, k))
  expected = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
  kit.assert_same("score", hardmax.score(zip(q, k, strict=True)), expected)


def test_a_forbidden_score_is_no_key():
  found = hardmax.Winners(jnp.array([-jnp.inf, 1.0]), jnp.array([3, 2]), jnp.array([7, 5]))
  score, count, last = found.checked()
  assert score.tolist() == [-np.inf, 1.0] and count.tolist() == [0, 2] and last.tolist() == [-1, 5]


def test_width():
  assert hardmax.too_wide(hardmax.MAX_WIDTH) is None
  assert hardmax.too_wide(9) == "head_dim 9 is more than 8"
