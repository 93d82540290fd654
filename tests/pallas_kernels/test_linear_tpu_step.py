"""A token at a time on a TPU, interpreted, against the recurrence."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

import kit
import linear_kit
from linear_kit import Problem
from pallas_kernels import linear_tpu_step

PROBLEMS = {
  "none": Problem(T=2, B=1, Nq=1, K=1, Kv=1, decay="none", scale=0.5),
  "head, grouped, odd": Problem(T=2, Nq=12, K=3, Kv=4, M=40, h=24, decay="head", harsh=True),
  "token, normalized": Problem(T=2, B=1, M=130, h=256, decay="token", normalize=True, harsh=True),
  "channel, normalized": Problem(T=2, Nq=8, K=8, Kv=8, decay="channel", normalize=True, harsh=True),
  "bfloat16": Problem(T=2, M=128, h=128, decay="token", dtype="bfloat16"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_tokens(name):
  problem = PROBLEMS[name]
  x, settings = problem.inputs(), problem.settings
  with kit.double():
    given = kit.to_double(tuple(x[name] for name in ("q", "k", "v", "g", "state")))
    want = linear_kit.recurrence(*given, settings=settings)
  state, found = x["state"], []
  g = x["g"]
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    run = jax.jit(lambda *given: linear_tpu_step.step(*given, settings))
    for t in range(problem.T):
      at = lambda x, t=t: x[:, t]
      one, state = run(
        *map(at, (x["q"], x["k"], x["v"])), g if g is None or g.ndim == 1 else at(g), state
      )
      found.append(one)
  assert found[0].dtype == x["v"].dtype
  kit.assert_trees_close((jnp.stack(found, 1), state), want, problem.dtype)


def test_a_weight_of_zero_gives_zero():
  problem = Problem(T=1, B=1, normalize=True)
  x = problem.inputs()
  state = jax.tree.map(jnp.zeros_like, x["state"])
  q, k, v, g = (x[name][:, 0] for name in "qkvg")
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    run = jax.jit(lambda *given: linear_tpu_step.step(*given, problem.settings))
    out, _ = run(q, jnp.zeros_like(k), v, g, state)
  assert not out.any()
