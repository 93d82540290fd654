"""The elementwise recurrence against itself token by token, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import dispatch
from attention.ops import linear_scan as ops

linear_scan: Any = ops.linear_scan  # an array or a pair, as it is asked; and some calls are wrong
B, D = 2, 5


def inputs(T, seed=0):
  make = kit.keys(seed)
  b = jax.random.normal(next(make), (B, T, D))
  log_a = -jnp.exp(2 * jax.random.normal(next(make), (B, T, D)) - 2)  # about -10 to -0.01
  return b, log_a, jax.random.normal(next(make), (B, D))


def documents(T, seed=3):
  starts = np.random.default_rng(seed).random((B, T)) < 6 / T
  return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def loop(b, log_a, state, ids=None):
  """The equation in NumPy: x at every token."""
  b, log_a, x = (np.asarray(y, np.float64) for y in (b, log_a, state))
  out = np.zeros_like(b)
  for t in range(b.shape[1]):
    same = np.ones((B, 1)) if ids is None or t == 0 else (ids[:, t] == ids[:, t - 1])[:, None]
    x = same * np.exp(log_a[:, t]) * x + b[:, t]
    out[:, t] = x
  return out


def value_and_gradients(b, log_a, state, **options):
  """((x, end), gradients of a weighted sum of both)."""

  def loss(b, log_a, state):
    out = linear_scan(b, log_a, initial_state=state, return_state=True, **options)
    waves = [jnp.sin(1.0 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in out]
    return sum(jnp.sum(x * w) for x, w in zip(out, waves, strict=True)), out

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  (_, out), gradients = run(b, log_a, state)
  return out, dict(zip(("b", "log_a", "initial_state"), gradients, strict=True))


def check(arrays, **options):
  got = value_and_gradients(*arrays, **options)
  with kit.double():
    want = value_and_gradients(*kit.to_double(arrays), implementation="reference", **options)
  kit.assert_trees_close(got, want)
  return got


def test_the_reference_is_the_equation():
  b, log_a, state = inputs(23)
  ids = documents(23)
  out, end = linear_scan(
    b, log_a, initial_state=state, segment_ids=ids, return_state=True, implementation="reference"
  )
  want = loop(b, log_a, state, np.asarray(ids))
  kit.assert_close("x", out, want)
  kit.assert_close("state", end, want[:, -1])


@pytest.mark.parametrize("T", [1, 7, 63, 300])
def test_output_state_and_every_gradient_equal_the_recurrence(T):
  check(inputs(T))


@pytest.mark.parametrize("reverse", [False, True])
def test_documents_in_both_directions(reverse):
  check(inputs(200), segment_ids=documents(200), reverse=reverse)


def test_padding_leaves_the_state_and_no_gradient():
  T, lengths = 150, jnp.array([0, 131], jnp.int32)
  (out, end), gradients = check(inputs(T), lengths=lengths, segment_ids=documents(T))
  assert not np.any(np.asarray(out[0])) and not np.any(np.asarray(out[1, 131:]))
  kit.assert_same("state of the empty row", end[0], inputs(T)[2][0])
  assert not np.any(np.asarray(gradients["b"][0])) and not np.any(
    np.asarray(gradients["b"][1, 131:])
  )


def test_any_decay_from_0_to_minus_infinity():
  """-10000s, 0s, small ones and resets side by side: exact, and every gradient a number."""
  b, log_a, state = inputs(300)
  choice = jnp.array([-jnp.inf, -1e4, -1e-3, 0.0, -1e-6, -30.0])
  log_a = jax.random.choice(jax.random.key(5), choice, log_a.shape)
  (out, _), gradients = value_and_gradients(b, log_a, state)
  kit.assert_close("x", out, loop(b, log_a, state))
  assert all(np.isfinite(np.asarray(x)).all() for x in gradients.values())
  assert np.all(np.asarray(gradients["log_a"])[np.asarray(log_a) <= -1e4] == 0)
  check((b, log_a, state))


def test_thousands_of_tokens_without_decay_are_a_sum():
  b = jnp.abs(inputs(4096)[0])
  kit.assert_close("x", linear_scan(b, jnp.zeros_like(b)), np.cumsum(np.asarray(b, np.float64), 1))


def test_two_halves_through_the_state_and_steps_equal_the_whole():
  b, log_a, state = inputs(141)
  want = linear_scan(b, log_a, initial_state=state)
  first, middle = linear_scan(b[:, :130], log_a[:, :130], initial_state=state, return_state=True)
  kit.assert_close("first", first, want[:, :130])
  x = ops.DecodeState(middle[:, None])
  for t in range(130, 141):
    one = [y[:, t, None] for y in (b, log_a)]
    ones = jnp.ones_like(one[0])
    x, out = ops.step(x, ones, ones, one[0], log_decay=one[1])
    kit.assert_close(f"step {t}", out[:, 0], want[:, t])


def test_the_future_changes_nothing_before_it_and_runs_repeat_bitwise():
  b, log_a, _ = inputs(300)
  run = jax.jit(linear_scan)
  out = run(b, log_a)
  kit.assert_same("again", run(b, log_a), out)
  for t in (1, 128, 201):
    changed = run(b.at[:, t:].multiply(-50.0), log_a.at[:, t:].multiply(0.1))
    kit.assert_same(f"before {t}", changed[:, :t], out[:, :t])


def test_gradients_have_gradients():
  arrays = inputs(12)

  def sharpness(implementation, *arrays):
    f = lambda *a: jnp.sum(
      jnp.sin(linear_scan(a[0], a[1], initial_state=a[2], implementation=implementation))
    )
    return sum(jnp.sum(x**2) for x in jax.grad(f, (0, 1, 2))(*arrays))

  slopes = lambda name: jax.jit(jax.grad(functools.partial(sharpness, name), (0, 1, 2)))
  got = slopes("associative")(*arrays)
  with kit.double():
    want = slopes("reference")(*kit.to_double(arrays))
  kit.assert_trees_close(got, want)


def test_bfloat16_inputs_lose_only_their_own_rounding():
  b, log_a, state = inputs(200)
  half = b.astype(jnp.bfloat16)
  out, end = linear_scan(half, log_a, initial_state=state, return_state=True)
  assert out.dtype == jnp.bfloat16 and end.dtype == jnp.float32
  want = loop(half.astype(jnp.float32), log_a, state)
  kit.assert_close("x", out.astype(jnp.float32), want, "bfloat16")
  kit.assert_close("state", end, want[:, -1])


def test_memory_grows_with_the_length():
  def extra(T):
    shape = jax.ShapeDtypeStruct((1, T, 64), jnp.float32)
    f = jax.grad(lambda b, a: jnp.sum(jnp.sin(linear_scan(b, a))), (0, 1))
    memory: Any = jax.jit(f).lower(shape, shape).compile().memory_analysis()
    return memory.temp_size_in_bytes

  assert extra(8192) - extra(4096) < 12 * 4 * 4096 * 64  # a dozen arrays like b, not log2(T) more


def test_under_shard_map_with_its_checks():
  b, log_a, state = inputs(40)
  f = lambda b, log_a, state: linear_scan(b, log_a, initial_state=state)
  loss = lambda f, *x: jnp.sum(jnp.sin(f(*x)))
  every = (0, 1, 2)
  want = jax.jit(jax.value_and_grad(functools.partial(loss, f), every))(b, log_a, state)
  mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.P("rows")
  sharded = jax.shard_map(f, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows)
  got = jax.jit(jax.value_and_grad(functools.partial(loss, sharded), every))(b, log_a, state)
  kit.assert_trees_close(got, want)


def test_what_runs_is_told_and_wrong_calls_say_what_is_wrong():
  b, log_a, state = inputs(8)
  assert "runs 'associative'" in dispatch.explain(ops.linear_scan, b, log_a)
  for options, message in [
    ({"log_a": log_a[:, :7]}, r"log_a must be of shape \(2, 8, 5\) .* got \(2, 7, 5\)"),
    ({"initial_state": state[:, :4]}, r"initial_state must be of shape \(2, 5\) .* got \(2, 4\)"),
    ({"reverse": True, "lengths": jnp.ones((B,), int)}, "lengths pads the end"),
    ({"implementation": "associate"}, "did you mean 'associative'"),
  ]:
    with pytest.raises(ValueError, match=message):
      linear_scan(b, **{"log_a": log_a, **options})
  q = jnp.ones((B, 8, 2, 4))
  with pytest.raises(ValueError, match="k's heads must divide the output's 2, got 3"):
    ops.attend(q, jnp.ones((B, 8, 3, 4)), q, log_decay=-q)
  with pytest.raises(
    ValueError, match=r"log_decay must be of shape \(2, 8, 2, 4\), got \(2, 8, 2\)"
  ):
    ops.attend(q, q, q, log_decay=-q[..., 0])
  with pytest.raises(ValueError, match="value_dim must be head_dim, got 3 and 4"):
    ops.init_state(1, num_heads=2, num_kv_heads=2, head_dim=4, value_dim=3, max_length=8)
