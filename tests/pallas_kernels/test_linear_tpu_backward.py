"""Gradients of linear attention on a TPU at the edges; `test_linear_tpu` compares all of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import kit
from linear_kit import Problem
from pallas_kernels import linear_tpu_backward
from pallas_kernels.linear import Normalized, Settings


def test_a_weight_of_zero_gives_zero_gradients_and_runs_are_alike():
  """Inverses of 0 stand for weights of 0: what such a token reads gives no gradient."""
  x = Problem(T=140, B=1, Nq=1, K=1, Kv=1, normalize=True).inputs()
  inverse = jnp.ones((1, 1, 140)).at[..., :3].set(0.0)
  normalized = Normalized(inverse, jnp.full((1, 1, 140), 0.5))
  given = (x["q"], x["k"], x["v"], x["g"], x["state"], normalized, x["d_out"], x["d_state"])
  run = jax.jit(lambda *given: linear_tpu_backward.backward(*given, Settings(1.0, True)))
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    found, again = run(*given), run(*given)
  dq = found[0]
  assert not np.asarray(dq[:, :3]).any() and np.asarray(dq[:, 3:]).any(-1).all()
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
    assert np.isfinite(np.asarray(one)).all()
    kit.assert_same("again", one, other)
