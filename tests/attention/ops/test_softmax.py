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
@pytest.mark.parametrize("bias", [-1e9, 3e4])
def test_probabilities_of_great_scores_that_tie(implementation, bias):
  """Beside a score of 1e9 a log-sum-exp has lost log S; probabilities are 1 / S all the same."""
  zero, v = jnp.zeros((1, 16, 1, 4)), kit.normal(jax.random.key(0), 1, 16, 1, 4)

  def f(v, bias):
    return dot_product_attention(zero, zero, v, bias, implementation=implementation)

  out, pull = jax.vjp(f, v, jnp.full((1, 1, 16, 16), bias))
  d_out = kit.normal(jax.random.key(1), *out.shape)
  d_v, d_bias = pull(d_out)
  mean = jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)
  kit.assert_close("out", out, mean)
  kit.assert_close("d_v", d_v, jnp.broadcast_to(d_out.mean(1, keepdims=True), v.shape))
  d_score = (d_out[0, :, 0] @ (v - mean)[0, :, 0].T) / 16
  kit.assert_close("d_bias", d_bias[0, 0], d_score)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_head_without_a_sink_is_as_if_there_were_none(implementation):
  """In rows that see a key and in rows that see none."""
  q, k, v = kit.Case(T=20, S=12).inputs()
  run = functools.partial(
    dot_product_attention, q, k, v, mask=masks.causal(-5), implementation=implementation,
    return_residual=True,
  )  # fmt: skip
  loss = lambda sinks: sum(jnp.where(jnp.isfinite(x), x, 0.0).sum() for x in run(sinks=sinks))
  sinks = jnp.array([-jnp.inf, 0.3, -jnp.inf, -1.0])
  d_sinks = jax.jit(jax.grad(loss))(sinks)
  assert (d_sinks[::2] == 0).all() and np.isfinite(d_sinks).all() and (d_sinks[1::2] != 0).all()
  for ours, without in zip(run(sinks=sinks), run(), strict=True):
    kit.assert_close("no sink", ours[:, :, ::2], without[:, :, ::2])


def test_float32_is_the_same_where_numbers_may_be_double():
  """`jax_enable_x64` makes Python's integers 64 bits wide; offsets into arrays must agree."""
  q, k, v = kit.Case(T=63, S=63).inputs()
  f = lambda *x: jnp.sin(dot_product_attention(*x, is_causal=True, implementation="tiled")).sum(
    dtype=jnp.float32
  )
  want = jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v)
  with kit.double():
    got = jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v)
  kit.assert_trees_close(got, want)


def test_gradients_of_float16_do_not_vanish():
  """dS of 1e-7 rounds to a multiple of 6e-8 in float16: it is summed in float32."""
  q, k, v = (x.astype(jnp.float16) for x in kit.Case(B=1, T=512, S=512, N=1, K=1).inputs())
  d_out = 1e-3 * kit.normal(jax.random.key(5), 1, 512, 1, v.shape[-1])

  def f(implementation, q, k, v):
    out = dot_product_attention(q, k, v, implementation=implementation)
    return (out.astype(jnp.float32) * d_out).sum()

  got = jax.jit(jax.grad(functools.partial(f, "tiled"), (0, 1, 2)))(q, k, v)
  wide = (x.astype(jnp.float32) for x in (q, k, v))
  want = jax.jit(jax.grad(functools.partial(f, "reference"), (0, 1, 2)))(*wide)
  for name, x, y in zip("qkv", got, want, strict=True):
    error = np.linalg.norm(np.float64(x) - np.float64(y)) / np.linalg.norm(np.float64(y))
    assert error < 3e-3, (name, error)


def test_what_jax_nn_takes_is_taken():
  """Lists, NumPy's float64, a number for a bias, a scale that is learned."""
  q, k, v = (np.asarray(x, np.float64) for x in kit.Case(T=40, S=40).inputs())
  options = {"bias": 0.0, "key_value_seq_lengths": [31, 40], "local_window_size": [9, 4]}
  out = attend_eagerly(q, k.tolist(), v, implementation="tiled", **options)
  lengths = jnp.array(options["key_value_seq_lengths"])
  want = jax.nn.dot_product_attention(
    *(jnp.asarray(x) for x in (q, k, v)), key_value_seq_lengths=lengths, local_window_size=(9, 4)
  )
  kit.assert_close("out", out, want)
  f = lambda attend, scale, **how: attend(*map(jnp.float32, (q, k, v)), scale=scale, **how).sum()
  slope = jax.grad(functools.partial(f, jax.nn.dot_product_attention))(jnp.float32(0.4))
  for implementation in ("xla", "tiled"):
    ours = jax.grad(functools.partial(f, attend_eagerly, implementation=implementation))
    kit.assert_close("scale", ours(jnp.float32(0.4)), slope, factor=5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nothing_comes_of_nothing(axis):
  """No rows, no queries, no keys: as `jax.nn` has it."""
  x = jnp.zeros((2, 4, 2, 8))
  q = k = x[:0] if axis == 0 else x
  q, k = (q[:, :0], k) if axis == 1 else (q, k[:, :0]) if axis == 2 else (q, k)
  with kit.double():
    out, lse = attend_eagerly(q, k, k, return_residual=True)
  assert out.dtype == lse.dtype == jnp.float32
  assert out.shape == q.shape and (out == 0).all()
  assert lse.shape == q.shape[:3] and (lse == -jnp.inf).all()


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


@pytest.mark.parametrize(
  ("mask", "message"),
  [
    (
      masks.segments(jnp.zeros((1, 3), jnp.int32)),
      r"query_ids .* \[#B, T\] = \[2, 4\], not \[1, 3\]",
    ),
    (masks.segments(jnp.zeros((3, 4), jnp.int32)), r"query_ids .* = \[2, 4\], not \[3, 4\]"),
    (~masks.from_array(jnp.ones((3, 3), bool)), r"array .* = \[2, 2, 4, 4\], not \[1, 1, 3, 3\]"),
    (
      masks.causal() & masks.from_array(jnp.ones((3, 1, 1), bool)),
      r"array .* = \[2, 2, 4, 4\], not \[1, 3, 1, 1\]",
    ),
    (masks.lengths(jnp.ones(3, jnp.int32)), r"query .* \[#B\] = \[2\], not \[3\]"),
  ],
)
def test_masks_that_do_not_fit_say_why(mask, message):
  x = jnp.zeros((2, 4, 2, 8))
  with pytest.raises(ValueError, match=message):
    dot_product_attention(x, x, x, mask=mask)


def test_bad_numbers_and_dtypes_say_why():
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(ValueError, match="logit_cap must be greater than 0, not -1"):
    dot_product_attention(x, x, x, logit_cap=-1.0)
  with pytest.raises(ValueError, match="logit_cap must be known before anything runs"):
    jax.jit(lambda cap: attend_eagerly(x, x, x, logit_cap=cap))(1.0)
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
