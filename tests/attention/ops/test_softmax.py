"""Softmax attention against NumPy in float64 and against jax.nn, over every argument and
implementation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import kit
from attention import dot_product_attention as attend_eagerly
from attention import masks
from attention.ops import softmax

# Compiled, a call of many small operations costs one compilation and not as many as operations.
dot_product_attention = jax.jit(
  attend_eagerly,
  static_argnames=(
    "scale", "is_causal", "local_window_size", "logit_cap", "implementation", "return_residual",
  ),
)  # fmt: skip
IMPLEMENTATIONS = (
  "xla",
  "tiled",
  "reference",
)  # the kernels answer in tests/attention/test_flash.py
CASES = [
  kit.Case(T=1, S=1),
  kit.Case(T=7, S=63, K=1),
  kit.Case(T=63, S=7, N=6, K=3, h=5),
  kit.Case(B=1, T=130, S=257, H=16, h=24),
]


def _modifiers(case):
  make = kit.keys(1)
  return {
    "bias": kit.normal(next(make), case.B, 1, case.T, case.S),
    "alibi_slopes": jax.random.uniform(next(make), (case.N,)),
    "sinks": kit.normal(next(make), case.N),
    "logit_cap": 2.0,
  }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_the_equation(case, implementation):
  """Everything at once: cap, bias, slopes, sinks, a causal mask that leaves rows empty when T > S +
  offset.
  """
  q, k, v = case.inputs()
  extra = _modifiers(case)
  mask = masks.causal(-2) & masks.sliding_window(40)
  out, lse = dot_product_attention(
    q, k, v, mask=mask, implementation=implementation, return_residual=True, **extra
  )
  allowed = mask.as_array(case.T, case.S)
  expected = kit.softmax_attention(
    q,
    k,
    v,
    allowed,
    bias=extra["bias"],
    cap=2.0,
    slopes=extra["alibi_slopes"],
    sinks=extra["sinks"],
  )
  kit.assert_close("out", out, expected[0])
  kit.assert_close("lse", lse, expected[1])
  assert lse.dtype == jnp.float32


@pytest.mark.parametrize("implementation", ["xla", "tiled"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_by_name(case, implementation):
  """Of q, k, v, bias, slopes and sinks, through output and log-sum-exp, against the reference in
  float64.
  """
  q, k, v = case.inputs()
  extra = _modifiers(case)
  cap = extra.pop("logit_cap")
  weights = kit.normal(jax.random.key(5), case.B, case.T, case.N, case.h)

  def loss(implementation, arrays):
    out, lse = dot_product_attention(
      **arrays, is_causal=True, logit_cap=cap, implementation=implementation, return_residual=True
    )
    return (out * weights.astype(out.dtype)).sum() + jnp.sin(
      jnp.where(jnp.isfinite(lse), lse, 0.0)
    ).sum()

  arrays = {"query": q, "key": k, "value": v, **extra}
  actual = jax.jit(jax.grad(functools.partial(loss, implementation)))(arrays)
  with kit.double():
    expected = jax.jit(jax.grad(functools.partial(loss, "reference")))(kit.to_double(arrays))
  # The slopes' gradient sums distances times terms that cancel over all pairs.
  kit.assert_close(
    "alibi_slopes", actual.pop("alibi_slopes"), expected.pop("alibi_slopes"), factor=10
  )
  kit.assert_trees_close(actual, jax.tree.map(np.asarray, expected), factor=2)


def test_reference_gradients_are_its_finite_differences():
  case = kit.Case(B=1, T=5, S=6, h=3)
  extra = _modifiers(case)
  cap = extra.pop("logit_cap")

  def f(arrays):
    return dot_product_attention(
      **arrays, is_causal=True, logit_cap=cap, implementation="reference", return_residual=True
    )

  with kit.double():
    arrays = kit.to_double(
      dict(zip(("query", "key", "value"), case.inputs(), strict=True), **extra)
    )
    check_grads(jax.jit(f), (arrays,), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "tiled"])
def test_bfloat16(implementation):
  """Against float64 of the same rounded inputs: what is lost is the rounding of p and of the
  output.
  """
  case = kit.Case(T=96, S=96, H=32, h=32)
  arrays = case.inputs(dtype="bfloat16")

  def loss(implementation, q, k, v):
    out = dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    return (out.astype(jnp.float32) ** 2).sum() if out.dtype == jnp.bfloat16 else (out**2).sum()

  actual = jax.jit(jax.grad(lambda x: loss(implementation, *x)))(arrays)
  with kit.double():
    expected = jax.jit(jax.grad(lambda x: loss("reference", *x)))(kit.to_double(arrays))
  assert all(x.dtype == jnp.bfloat16 for x in actual)
  kit.assert_trees_close(actual, jax.tree.map(np.asarray, expected), "bfloat16", factor=2)


def _jax_nn_calls():
  case = kit.Case(T=24, S=24)
  make = kit.keys(3)
  bias = kit.normal(next(make), 1, 4, 24, 24)
  mask = jax.random.bernoulli(next(make), 0.7, (2, 1, 24, 24)).at[..., 0].set(True)
  return case.inputs(), {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bias": {"bias": bias},
    "mask": {"mask": mask},
    "mask of one head": {"mask": mask[0, 0]},
    "window": {"local_window_size": (3, 1)},
    "both sides": {"local_window_size": 2, "is_causal": True},
    "lengths": {
      "query_seq_lengths": jnp.array([24, 10], jnp.int32),
      "key_value_seq_lengths": jnp.array([20, 12], jnp.int32),
    },
    "all": {
      "bias": bias,
      "mask": mask,
      "is_causal": True,
      "local_window_size": (9, 0),
      "scale": 0.2,
    },
  }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", _jax_nn_calls()[1])
def test_drop_in_for_jax_nn(name, implementation):
  (q, k, v), calls = _jax_nn_calls()
  arguments = calls[name]
  expected, residual = jax.nn.dot_product_attention(q, k, v, **arguments, return_residual=True)
  out, lse = dot_product_attention(
    q, k, v, **arguments, implementation=implementation, return_residual=True
  )
  if "query_seq_lengths" in arguments:  # the residual of a padded query: -inf here
    padded = jnp.arange(24)[None, :, None] >= arguments["query_seq_lengths"][:, None, None]
    assert (lse == -jnp.inf)[jnp.broadcast_to(padded, lse.shape)].all()
    lse, residual = (jnp.where(padded, 0.0, x) for x in (lse, residual))
  kit.assert_close("out", out, expected)
  kit.assert_close("residual", lse, residual)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unbatched(implementation):
  q, k, v = kit.Case(B=1).inputs()
  out, lse = dot_product_attention(
    q, k, v, is_causal=True, implementation=implementation, return_residual=True
  )
  one = dot_product_attention(
    q[0], k[0], v[0], is_causal=True, implementation=implementation, return_residual=True
  )
  kit.assert_same("out", one[0], out[0])
  kit.assert_same("lse", one[1], lse[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_rows_are_zero_with_zero_gradients(implementation):
  q, k, v = kit.Case(T=20, S=12).inputs()
  mask = masks.causal(-5)

  def loss(q, k, v):
    out, lse = dot_product_attention(
      q, k, v, mask=mask, implementation=implementation, return_residual=True
    )
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum(), (out, lse)

  (dq, dk, dv), (out, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  assert (out[:, :5] == 0).all() and (lse[:, :5] == -jnp.inf).all() and (dq[:, :5] == 0).all()
  assert all(np.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("implementation", ["xla", "tiled"])
def test_large_logits_and_repeated_keys(implementation):
  """Scores of +-3e4 and keys that are all alike: finite, and right."""
  q, k, v = kit.Case(T=70, S=70).inputs()
  for q_, k_ in ((q * 1e2, k * 1e2), (q, jnp.broadcast_to(k[:, :1], k.shape)), (q, k * 0.0)):
    out = dot_product_attention(q_, k_, v, is_causal=True, implementation=implementation)
    expected, _ = kit.softmax_attention(q_, k_, v, masks.causal().as_array(70, 70))
    # A float32 score of 3e4 is off by up to 2e-3, and so is the exponent of the winner.
    kit.assert_close("out", out, expected, factor=500 if q_ is not q else 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_future_changes_nothing(implementation):
  q, k, v = kit.Case(T=40, S=40).inputs()
  f = lambda k, v: dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
  changed = f(k.at[:, 25:].add(100.0), v.at[:, 25:].set(-1e9))
  kit.assert_same("past", changed[:, :25], f(k, v)[:, :25])


@pytest.mark.parametrize("implementation", ["xla", "tiled"])
def test_vmap_and_two_runs(implementation):
  q, k, v = (
    x[None].repeat(3, 0) * jnp.arange(1.0, 4.0).reshape(3, 1, 1, 1, 1) for x in kit.Case().inputs()
  )
  f = jax.jit(
    lambda q, k, v: dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
  )
  mapped = jax.vmap(f)(q, k, v)
  for i in range(3):
    kit.assert_close(f"row {i}", mapped[i], f(q[i], k[i], v[i]))
  kit.assert_same("again", f(q[0], k[0], v[0]), f(q[0], k[0], v[0]))


def test_second_derivatives_where_promised_and_a_reason_where_not():
  q, k, v = kit.Case(B=1, T=6, S=6).inputs()

  def loss(implementation, q):
    return (
      dot_product_attention(q, k, v, is_causal=True, implementation=implementation) ** 2
    ).sum()

  def second(implementation):
    first = jax.grad(lambda q: loss(implementation, q))
    return jax.jit(jax.grad(lambda q: (first(q) ** 2).sum()))(q)

  kit.assert_close("second", second("xla"), second("reference"), factor=5)
  with pytest.raises(NotImplementedError, match="differentiable once"):
    second("tiled")


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("lengths", [None, (13, 5)])
def test_prefill_in_two_parts_and_steps(window, lengths):
  """A ring of the window's capacity answers as the whole text does, at ragged lengths, over several
  turns.
  """
  case = kit.Case(T=40, S=40)
  q, k, v = case.inputs()
  expected = np.asarray(kit.compiled(softmax.attend)(q, k, v, window=window))
  q, k, v = (np.asarray(x) for x in (q, k, v))
  prefill, step = (
    jax.jit(functools.partial(function, window=window))
    for function in (softmax.prefill, softmax.step)
  )
  state = softmax.init_state(
    2, num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8, max_length=40, window=window
  )
  assert state.key.shape[2] == (40 if window is None else 8)
  read = np.zeros(2, int)
  for T in (13, 11):
    count = np.array(lengths if lengths and T == 13 else (T, T))
    index = read[:, None] + np.arange(T)
    part = [np.take_along_axis(x, index[..., None, None], 1) for x in (q, k, v)]
    state, out = prefill(state, *part, lengths=count.astype(np.int32))
    for b in range(2):
      wanted = expected[b, read[b] : read[b] + count[b]]
      kit.assert_close(f"prefill {T}, row {b}", out[b, : count[b]], wanted)
    read += count
  for _ in range(12):
    token = [x[np.arange(2), read] for x in (q, k, v)]
    state, out = step(state, *token)
    kit.assert_close(f"steps at {read}", out, expected[np.arange(2), read])
    read += 1
  np.testing.assert_array_equal(state.length, read)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"query": (4, 2, 8)}, r"must all be \[B, T, N, H\]"),
    ({"query": (2, 4, 3, 8)}, "key heads must divide query heads: N=3, K=2"),
    ({"query": (3, 4, 2, 8)}, r"agree in batch and head width: query \[3, 4, 2, 8\]"),
    ({"value": (2, 5, 2, 8)}, "key and value must agree in batch, length and heads"),
    (
      {"bias": (1, 4, 4, 7)},
      r"bias must broadcast to \[B, N, T, S\] = \[2, 2, 4, 4\], not \[1, 4, 4, 7\]",
    ),
    ({"sinks": (3,)}, r"sinks must have shape \[2\], not \[3\]"),
    ({"query_seq_lengths": (1,)}, r"query_seq_lengths must have shape \[2\], not \[1\]"),
  ],
)
def test_bad_calls_say_why(change, message):
  arguments = {name: jnp.zeros((2, 4, 2, 8)) for name in ("query", "key", "value")}
  arguments |= {name: jnp.zeros(shape) for name, shape in change.items()}
  with pytest.raises(ValueError, match=message):
    dot_product_attention(**arguments)


def test_bad_numbers_and_dtypes_say_why():
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(ValueError, match="logit_cap must be greater than 0, not -1"):
    dot_product_attention(x, x, x, logit_cap=-1.0)
  with pytest.raises(ValueError, match="one floating dtype, not float32, bfloat16, float32"):
    dot_product_attention(x, x.astype(jnp.bfloat16), x)
  with pytest.raises(ValueError, match="array must be bool"):
    dot_product_attention(x, x, x, mask=jnp.zeros((4, 4), jnp.int32))
  with (
    pytest.raises(
      NotImplementedError, match="'tiled' cannot run this call: it computes in float32"
    ),
    kit.double(),
  ):
    x = jnp.zeros((1, 4, 2, 8), jnp.float64)
    dot_product_attention(x, x, x, implementation="tiled")


def test_cost_counts_the_pairs_of_the_window():
  whole = softmax.cost(2, 8, 8, 4, 2, 16, 32)
  assert whole.flops == 2 * 2 * 4 * (8 * 9 / 2) * (16 + 32)
  assert whole.state_bytes == 2 * 8 * 2 * (16 + 32) * 4
  window = softmax.cost(2, 8, 8, 4, 2, 16, 32, window=3)
  assert window.flops == 2 * 2 * 4 * (1 + 2 + 3 * 6) * (16 + 32)
  assert window.state_bytes == 2 * 3 * 2 * (16 + 32) * 4
