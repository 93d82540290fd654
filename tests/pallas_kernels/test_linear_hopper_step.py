"""One token on Hopper GPUs, interpreted, against the recurrence in float64."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
import linear_kit
from linear_kit import Problem
from pallas_kernels import aot, linear_hopper
from pallas_kernels.linear import State

PROBLEMS = [
  Problem(T=1, M=100, h=70, Nq=4, K=2, Kv=1, decay="channel", normalize=True, dtype="bfloat16"),
  Problem(T=1, decay="token", harsh=True, scale=0.5, dtype="bfloat16"),
  Problem(T=1, B=1, decay="head", dtype="bfloat16"),
  Problem(T=1, B=1, M=16, h=16, decay="none", dtype="bfloat16"),
]


def _one(problem):
  x = problem.inputs()
  g = x["g"] if x["g"] is None or x["g"].ndim == 1 else x["g"][:, 0]
  return x, (*(x[name][:, 0] for name in "qkv"), g, x["state"])


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.decay)
def test_a_step_is_one_token_of_the_recurrence(problem):
  x, given = _one(problem)
  with kit.double():
    wide = kit.to_double([x[name] for name in ("q", "k", "v", "g", "state")])
    want, state = linear_kit.recurrence(*wide, problem.settings)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    out, new = jax.jit(lambda *given: linear_hopper.step(*given, problem.settings))(*given)
  kit.assert_close("out", out, want[:, 0], "bfloat16")
  kit.assert_close("state.kv", new.kv, state.kv)
  if problem.normalize:
    kit.assert_close("state.z", new.z, state.z)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.decay)
def test_lowers_for_the_chip(problem):
  kit.needs_compiler("h200")
  _, given = _one(problem)
  aot.lower_for(
    aot.CHIPS["h200"], lambda *given: linear_hopper.step(*given, problem.settings), *given
  )


def test_the_state_is_updated_in_place():
  """A scan of steps has no copy of the state in its turns, where XLA keeps the carry in one place;
  without the alias it has one a token.
  """
  kit.needs_compiler("h200")
  problem = Problem(T=1, B=1, M=64, h=64, decay="token", dtype="bfloat16")
  q, k, v, g, state = _one(problem)[1]

  def decode(kv, *tokens):
    def token(kv, x):
      out, state = linear_hopper.step(*x, State(kv, None), problem.settings)
      return state.kv, out

    return jax.lax.scan(token, kv, tokens)

  tokens = [jnp.stack([x] * 3) for x in (q, k, v, g)]
  program = aot.compile_for(aot.CHIPS["h200"], decode, state.kv, *tokens).as_text()
  (turn,) = (part for part in program.split("\n\n") if "mosaic_gpu" in part)
  assert "f32[1,2,64,64]" in turn and " copy(" not in turn


def test_a_state_that_is_forgotten_leaves_nothing():
  """Whatever was there, to the bit."""
  _, (q, k, v, g, state) = _one(PROBLEMS[1])
  forget = jnp.full_like(g, -128.0)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    step = lambda state: linear_hopper.step(q, k, v, forget, state, PROBLEMS[1].settings)
    kit.assert_same("out", step(state)[0], step(State(state.kv * 1e6, None))[0])
