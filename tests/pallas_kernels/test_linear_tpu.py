"""Linear attention on a TPU, interpreted with races reported and fresh memory full of NaN, against
the recurrence in float64: every result and every gradient by name.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import kit
import linear_kit
from linear_kit import Problem
from pallas_kernels import aot, linear_tpu
from pallas_kernels.linear import Normalized, Settings


def _problem(**fields):
  return Problem(**({"B": 1, "Nq": 1, "K": 1, "Kv": 1} | fields))


PROBLEMS = {
  "token, grouped, harsh": _problem(T=150, Nq=2, M=136, h=144, scale=0.3, harsh=True),
  "token, normalized, documents": _problem(T=140, B=2, normalize=True, document=50, harsh=True),
  "head, bfloat16, many heads": _problem(
    T=130, Nq=16, K=2, Kv=16, M=64, h=48, decay="head", scale=0.5, dtype="bfloat16"
  ),
  "none, normalized, one token": _problem(T=1, decay="none", normalize=True),
  "channel, normalized, documents": _problem(
    T=140, decay="channel", normalize=True, document=50, harsh=True
  ),
}
"""What runs in the interpreter, forward and backward."""

LOWERED = PROBLEMS | {
  "channel, bfloat16, wide": _problem(
    T=300, Nq=2, Kv=4, M=200, h=256, decay="channel", normalize=True, dtype="bfloat16"
  ),
  "token, six heads of two": _problem(T=300, Nq=6, K=2, Kv=3, M=96, h=64, dtype="bfloat16"),
}
"""What is lowered for every chip."""


def _interpreter():
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  return pltpu.force_tpu_interpret_mode(params)


@pytest.mark.parametrize("name", PROBLEMS)
def test_results_and_gradients(name):
  with _interpreter():
    linear_kit.check(linear_tpu, PROBLEMS[name])


@linear_kit.FEW
@hypothesis.given(linear_kit.problems(longest=160, dtype="float32"))
def test_any_call(problem):
  with _interpreter():
    linear_kit.check(linear_tpu, problem)


def test_a_document_does_not_see_the_one_before():
  """Bit for bit: exp(FORGET) is 0, whatever was there; and a weight of zero gives zeros."""
  x = _problem(T=100, document=50, normalize=True).inputs()
  k = x["k"].at[:, 50:53].set(0.0)

  @jax.jit
  def forward(v):
    return linear_tpu.forward(x["q"], k, v, x["g"], x["state"], Settings(1.0, True))[:2]

  with _interpreter():
    out, weight = forward(x["v"])
    other, _ = forward(x["v"].at[:, :50].mul(1e4))
  kit.assert_same("second document", out[:, 50:], other[:, 50:])
  assert np.abs(out[:, :50] - other[:, :50]).max() > 0
  assert not np.asarray(weight[..., 50:53]).any() and not np.asarray(out[:, 50:53]).any()
  assert np.asarray(weight[..., 53:]).all()


def test_refusals_name_the_values():
  x = lambda width, dtype: jax.ShapeDtypeStruct((1, 8, 1, width), dtype)
  refuse = lambda q, k, v: linear_tpu.unsupported(q, k, v, None, Settings(1.0, False))
  narrow, wide, half = x(64, jnp.bfloat16), x(300, jnp.bfloat16), x(64, jnp.float16)
  assert refuse(narrow, narrow, narrow) is None
  assert refuse(narrow, narrow, wide) == "head_dim 300 is more than 256"
  assert "float16" in refuse(half, half, half)


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_the_chip(name):
  """What the interpreter forgives."""
  kit.needs_compiler("v5e")
  problem = LOWERED[name]
  x = problem.inputs()
  one = jax.ShapeDtypeStruct((problem.B, problem.N, problem.T), jnp.float32)
  normalized = Normalized(one, one) if problem.normalize else None
  given = tuple(x[name] for name in ("q", "k", "v", "g", "state"))

  def both(given, *rest):
    forward = linear_tpu.forward(*given, problem.settings)
    return forward, linear_tpu.backward(*given, *rest, problem.settings)

  aot.lower_for(aot.CHIPS["v5e"], both, given, normalized, x["d_out"], x["d_state"])
