"""Linear attention on Hopper GPUs, interpreted with its barriers, rings, warpgroups and a race
detector that fails on a race, against the recurrence in float64: every result and every gradient.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
import linear_kit
from linear_kit import Problem
from pallas_kernels import aot, linear_hopper
from pallas_kernels.linear import Normalized, Settings


def _problem(**fields):
  return Problem(**({"B": 1, "dtype": "bfloat16"} | fields))


PROBLEMS = {
  "token, normalized, harsh, grouped, documents": _problem(
    T=130, M=40, h=96, K=1, document=50, normalize=True, harsh=True
  ),
  "head, grouped": _problem(T=70, K=1, Kv=1, h=128, decay="head", scale=0.5),
  "none, one token": _problem(T=1, Nq=1, K=1, Kv=1, M=16, h=16, decay="none"),
  "none, normalized, wide": _problem(
    T=65, Nq=1, K=1, Kv=1, M=200, h=250, decay="none", normalize=True
  ),
  "channel, normalized, harsh, grouped, documents": _problem(
    T=70, M=100, h=96, K=1, Kv=1, decay="channel", document=50, normalize=True, harsh=True
  ),
  "token, normalized, harsh, float32": _problem(
    T=70, Nq=1, K=1, Kv=1, normalize=True, harsh=True, dtype="float32"
  ),
  "channel, harsh, wide, float32": _problem(
    T=66, Nq=1, K=1, Kv=1, M=100, h=70, decay="channel", harsh=True, scale=0.3, dtype="float32"
  ),
}  # fmt: skip


def _interpreter():
  return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.parametrize("name", PROBLEMS)
def test_results_and_gradients(name):
  with _interpreter():
    linear_kit.check(linear_hopper, PROBLEMS[name], on_chip=False)


@linear_kit.FEW
@hypothesis.given(linear_kit.problems(longest=80, dtype="bfloat16"))
def test_any_call(problem):
  with _interpreter():
    linear_kit.check(linear_hopper, problem, on_chip=False)


def test_a_document_does_not_see_the_one_before():
  """Bit for bit: exp(FORGET) is 0, whatever was there."""
  x = _problem(T=66, Nq=1, K=1, Kv=1, document=50).inputs()
  forward = jax.jit(
    lambda v: linear_hopper.forward(
      x["q"], x["k"], v, x["g"], x["state"], Settings(1.0, False), on_chip=False
    )
  )
  with _interpreter():
    out = forward(x["v"])[0]
    other = forward(x["v"].at[:, :50].mul(1e4))[0]
  kit.assert_same("second document", out[:, 50:], other[:, 50:])
  assert np.abs(np.asarray(out[:, :50] - other[:, :50], np.float32)).max() > 0


def test_a_weight_of_zero_gives_zeros_and_no_nan():
  """Keys of zero before anything was written: the output and every gradient that meets it."""
  x = _problem(T=10, Nq=1, K=1, Kv=1, normalize=True).inputs()
  state = jax.tree.map(jnp.zeros_like, x["state"])
  k, settings = x["k"].at[:, :3].set(0.0), Settings(1.0, True)
  with _interpreter():
    given = x["q"], k, x["v"], x["g"], state

    @jax.jit
    def both(*given):
      out, weight, _ = linear_hopper.forward(*given, settings, on_chip=False)
      inverse = jnp.where(weight == 0, 0.0, 1 / jnp.where(weight == 0, 1.0, weight))
      normalized = Normalized(inverse, jnp.zeros_like(weight))
      gradients = linear_hopper.backward(
        *given, normalized, x["d_out"], x["d_state"], settings, on_chip=False
      )
      return out, weight, gradients

    out, weight, found = both(*given)
  assert not np.asarray(weight)[..., :3].any() and not np.asarray(out)[:, :3].any()
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(found))
  assert not np.asarray(found[0])[:, :3].any()


def test_refusals_name_the_values():
  x = lambda width, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 8, 1, width), dtype)
  refuse = lambda q, k, v: linear_hopper.unsupported(q, k, v, None, Settings(1.0, False))
  narrow, wide, half = x(64), x(300), x(64, jnp.float16)
  single = functools.partial(x, dtype=jnp.float32)
  assert refuse(narrow, narrow, narrow) is None
  assert refuse(wide, wide, narrow) == "width of q and k 300 is more than 256"
  assert refuse(narrow, narrow, wide) == "width of v 300 is more than 256"
  assert "not float16" in refuse(half, half, half)
  assert refuse(single(128), single(128), single(256)) is None
  assert "bfloat16, float32" in refuse(narrow, narrow, single(64))
  assert refuse(single(129), single(129), single(64)).endswith("129 is more than 128 in float32")
  decays = jax.ShapeDtypeStruct((70_000, 8, 1, 64), jnp.float32)
  found = linear_hopper.unsupported(narrow, narrow, narrow, decays, Settings(1.0, False))
  assert found == "batch 70000 is more than 65535, with decays per channel"


@pytest.mark.parametrize("name", PROBLEMS)
def test_lowers_for_the_chip(name):
  """What the interpreter forgives: layouts, lengths of copies, what a product may read."""
  kit.needs_compiler("h200")
  problem = PROBLEMS[name]
  x, settings = problem.inputs(), problem.settings
  one = jax.ShapeDtypeStruct((problem.B, problem.N, problem.T), jnp.float32)
  normalized = Normalized(one, one) if problem.normalize else None
  given = x["q"], x["k"], x["v"], x["g"], x["state"]

  def both(given, *rest):
    forward = linear_hopper.forward(*given, settings)
    return forward, linear_hopper.backward(*given, *rest, settings)

  aot.lower_for(aot.CHIPS["h200"], both, given, normalized, x["d_out"], x["d_state"])


def test_time_in_parts_fills_the_chip_and_no_more():
  assert linear_hopper.parts(96, 8192, 128) == 1  # 192 blocks of threads
  assert linear_hopper.parts(32, 16384, 128) == 2  # 64
  assert linear_hopper.parts(1, 16384, 64) == 32  # of 512 tokens
  assert linear_hopper.parts(1, 16383, 64) == 1
