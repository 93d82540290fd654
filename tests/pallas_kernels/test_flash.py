"""What a kernel's derivative takes beside the kernel, by plain products instead of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from pallas_kernels import flash, tiles

GREAT = [0.0, 200.0, -1e4, 3e5, -1e9, 1e30]
"""What is added to every score of a row; a last row may attend to nothing."""


def _inputs():
  """Scores `B N T S` that are whole numbers, of which half in each row tie, values, gradients."""
  make = kit.keys(11)
  tie = jax.random.bernoulli(next(make), 0.5, (1, 2, len(GREAT) + 1, 40)).at[..., 0].set(True)
  added = jnp.asarray([*GREAT, -jnp.inf])[:, None]
  score = jnp.where(tie, added, added - jnp.maximum(abs(added), 1.0))
  v, d_out = kit.normal(next(make), 1, 40, 2, 8), kit.normal(next(make), 1, len(GREAT) + 1, 2, 8)
  return score, v, jnp.array([0.0, -jnp.inf]), d_out, kit.normal(next(make), *score.shape[:3])


def _attend(score, v, sinks):
  """(out, log-sum-exp) as the equation stands, in the dtype of the scores."""
  sink = jnp.broadcast_to(sinks[None, :, None, None], (*score.shape[:3], 1))
  m = jax.lax.stop_gradient(jnp.maximum(score.max(-1, keepdims=True), sink))
  m = jnp.where(m == -jnp.inf, 0.0, m)
  p = jnp.exp(score - m)
  l = p.sum(-1, keepdims=True) + jnp.exp(sink - m)
  empty = l == 0.0
  l = jnp.where(empty, 1.0, l)
  out = jnp.einsum("bnts,bsnh->btnh", p / l, v)
  return out, jnp.where(empty, -jnp.inf, m + jnp.log(l))[..., 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_great_scores(dtype):
  """Those of a row whose scores are 1e30 are as right as those of any other."""
  score, v, sinks, d_out, d_lse = _inputs()
  v, d_out = v.astype(dtype), d_out.astype(dtype)
  score2, sink2 = score * tiles.LOG2_E, sinks[None, :, None] * tiles.LOG2_E
  m = jnp.maximum(score2.max(-1), sink2)
  p = jnp.exp2(score2 - tiles.finite(m)[..., None])
  l = p.sum(-1) + jnp.exp2(sink2 - tiles.finite(m))
  wide = v.astype(jnp.float32)
  total = jnp.where(l == 0.0, 1.0, l)[..., None]
  out = jnp.einsum("bnts,bsnh->btnh", p / total, wide).astype(dtype)

  rows = flash.gradients_of_rows((out, m, l), d_out, d_lse, flash.Extras(bias=score))
  assert rows.d_out.dtype == v.dtype and rows.base.dtype == rows.delta.dtype == jnp.float32
  p, given = jnp.exp2(score2 - rows.base[..., None]), rows.d_out.astype(jnp.float32)
  d_p = jnp.einsum("btnh,bsnh->bnts", given, wide)
  actual = {
    "d_v": jnp.einsum("bnts,btnh->bsnh", p, given),
    "d_score": p * (d_p - rows.delta[..., None]),
    "d_sinks": flash.d_sinks(sinks, rows),
  }
  with kit.double():
    given = kit.to_double((score, v, sinks, d_out, d_lse))
    (_, lse), pull = jax.vjp(_attend, *given[:3])
    d_score, d_v, d_sinks = pull((given[3], jnp.where(lse == -jnp.inf, 0.0, given[4])))
  np.testing.assert_allclose(flash.log_sum_exp(m, l), lse, rtol=3e-7)
  expected = {"d_v": d_v, "d_score": d_score, "d_sinks": d_sinks}
  for name, x in actual.items():
    kit.assert_close(name, x, expected[name], dtype)


def test_without_a_bias_nothing_is_divided():
  """The gradient of the output stays what it was, bit for bit, however great a score."""
  d_out = kit.normal(jax.random.key(0), 1, 3, 1, 4).astype("bfloat16")
  m, l = jnp.array([[[0.0, 300.0, -jnp.inf]]]), jnp.array([[[2.0, 4.0, 0.0]]])
  rows = flash.gradients_of_rows((d_out, m, l), d_out, 0.0 * l, flash.Extras())
  kit.assert_same("d_out", rows.d_out, d_out)
  np.testing.assert_array_equal(rows.base[0, 0], [1.0, 302.0, np.inf])
