"""What is true of hard-max attention alone."""

import functools
import itertools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
import kit
from attention import masks, plane
from attention.ops import hardmax

FORMS = ("reference", "tiled", "bulk")


def planar(family="grid", T=60, seed=0):
  """One head, `1 T 1 2`, with values."""
  q, k = hardmax_kit.planar(family, T, seed)
  v = np.random.default_rng(seed).normal(size=(T, 3)).astype(np.float32)
  return tuple(jnp.asarray(x)[None, :, None] for x in (q, k, v))


@functools.cache
def compiled(form, **options):
  return jax.jit(functools.partial(
    hardmax.hardmax_attention, implementation=form, return_residual=True, **options
  ))  # fmt: skip


@pytest.mark.parametrize("ties", plane.TIES)
def test_all_forms_are_one_function(ties):
  """The same winners bit for bit, in three forms and both orders of ties."""
  q, k, v = planar()
  (out, winners), *others = (compiled(f, ties=ties, is_causal=True)(q, k, v) for f in FORMS)
  expected = hardmax_kit.scan(np.asarray(q[0, :, 0]), np.asarray(k[0, :, 0]))
  np.testing.assert_array_equal(winners.count[0, :, 0], expected.count)
  for other, its_winners in others:
    kit.assert_close("out", other, out)
    for name, a, b in zip(hardmax.Winners._fields, its_winners, winners, strict=True):
      kit.assert_same(name, a, b)
  later_is_not_read_for_a_nan(ties, q, k)


def later_is_not_read_for_a_nan(ties, q, k):
  """Every value is its position. Of numbers beside a NaN any may be read, or none."""
  now = np.arange(1, 61, dtype=np.float32)
  for form, bad in itertools.product(FORMS, ([0], [0, 1, 40], range(60))):
    nan, v = k.at[0, np.asarray(bad), 0, 0].set(jnp.nan), jnp.stack([now] * 3, -1)[None, :, None]
    out, winners = compiled(form, ties=ties, is_causal=True)(q, nan, v)
    assert (np.asarray(out)[0, :, 0] <= now[:, None]).all(), form
    assert (np.asarray(winners.last)[0, :, 0] <= np.arange(60)).all(), form
    none = np.asarray(winners.count) == 0
    assert not np.asarray(out)[none].any() and (np.asarray(winners.last)[none] == -1).all(), form


def test_it_is_the_limit_of_softmax():
  q, k, v = planar()
  hard = hardmax.hardmax_attention(q, k, v, is_causal=True)
  soft = attention.dot_product_attention(q, k, v, is_causal=True, scale=100.0)
  kit.assert_close("out", hard, soft)


@pytest.mark.parametrize(("dtype", "last"), [("float32", 4096), ("float64", 20000)])
def test_addresses_are_exact_up_to_the_bound(dtype, last):
  """Every address near the end of the range finds itself among all of them; in float32 not one
  beyond: from 4097 on, squares need more than 24 bits.
  """

  def missed(first, stop, count):
    i = np.arange(count, dtype=dtype)
    q = np.stack([i[first:stop], np.ones(stop - first, dtype)], 1)
    k = np.stack([2 * i, -(i**2)], 1)
    with kit.double():
      _, winners = hardmax.hardmax_attention(
        *(jnp.asarray(x)[:, None] for x in (q, k, k)), implementation="tiled", return_residual=True
      )
    wrong = (np.asarray(winners.last)[:, 0] != np.arange(first, stop)) | (winners.count[:, 0] != 1)
    return int(np.asarray(wrong).sum())

  assert missed(last - 400, last + 1, last + 1) == 0
  if dtype == "float32":
    assert missed(4096, 4500, 4500) > 0


def test_centered_addresses_reach_twice_as_far():
  i = np.arange(8192, dtype=np.float32) - 4096
  key = jnp.asarray(np.stack([2 * i, -(i**2)], 1))[:, None]
  query = jnp.asarray(np.stack([i, np.ones_like(i)], 1))[:, None]
  ends = jnp.concatenate([query[:50], query[-50:]])
  attend = jax.jit(lambda q: hardmax.hardmax_attention(q, key, key, return_residual=True)[1].last)
  found = np.asarray(attend(ends))[:, 0]
  np.testing.assert_array_equal(found, [*range(50), *range(8142, 8192)])


def test_nearest_keys_in_a_space():
  make = kit.keys()
  q, k, v = (kit.normal(next(make), 1, 50, 2, width) for width in (4, 4, 3))
  out = hardmax.nearest_key_attention(q, k, v, is_causal=True)
  far = ((np.asarray(q)[0, :, None] - np.asarray(k)[0, None]) ** 2).sum(-1)
  far = np.where(np.tri(50, dtype=bool)[..., None], far, np.inf)
  nearest = far.argmin(1)
  for n in range(2):
    np.testing.assert_array_equal(out[0, :, n], np.asarray(v)[0, nearest[:, n], n])


def test_the_predecessor_in_a_list_of_numbers():
  """Keys on a line become planar, and `bulk` runs them."""
  q, k = np.random.default_rng(0).integers(0, 500, (2, 60)).astype(np.float32)
  lifted = hardmax.lift(*(jnp.asarray(x)[None, :, None, None] for x in (q, k)))
  v = jnp.asarray(np.repeat(k, 3).reshape(1, 60, 1, 3))
  # Of two neighbors as far, "average" would read the middle.
  out, _ = compiled("bulk", ties="latest", is_causal=True)(*lifted, v)
  far = np.where(np.tri(60, dtype=bool), np.abs(q[:, None] - k), np.inf)
  np.testing.assert_array_equal(np.abs(np.asarray(out)[0, :, 0, 0] - q), far.min(1))


@pytest.mark.parametrize(("dtype", "last"), [("float16", 2048), ("bfloat16", 256)])
def test_nearest_integers_in_half_precision(dtype, last):
  """To the greatest of which it holds all, though not their squares: each finds itself."""
  x = jnp.arange(last - 299 if last > 299 else 0, last + 1, dtype=jnp.float32)
  x = jnp.asarray(x, dtype)[:, None, None]
  out, winners = hardmax.nearest_key_attention(x, x, x, return_residual=True)
  kit.assert_same("out", out, x)
  np.testing.assert_array_equal(winners.count, 1)


def test_straight_through_is_hard_forward_and_soft_backward():
  q, k, v = kit.Case(T=20, S=20).inputs()

  def loss(through, q, k, v):
    out = hardmax.hardmax_attention(q, k, v, is_causal=True, straight_through=through)
    return (out**2).sum(), out

  run = lambda through: jax.jit(
    jax.value_and_grad(functools.partial(loss, through), (0, 1, 2), has_aux=True)
  )
  (_, hard), (dq, dk, dv) = run(None)(q, k, v)
  # An inverse temperature that changes from step to step is traced.
  annealed = jax.jit(lambda through, *x: run(through)(*x))
  (_, out), (dq_soft, dk_soft, dv_hard) = annealed(0.5, q, k, v)
  assert not np.asarray(dq).any() and not np.asarray(dk).any()
  kit.assert_close("out", out, hard)
  kit.assert_close("dv", dv_hard, dv)
  soft = lambda q, k: hardmax.top_k_attention(q, k, v, top_k=8, scale=2.0, is_causal=True)[0]
  expected = jax.jit(lambda q, k, g: jax.vjp(soft, q, k)[1](g))(q, k, 2 * hard)
  kit.assert_close("dq", dq_soft, expected[0])
  kit.assert_close("dk", dk_soft, expected[1])


def test_the_mass_that_the_best_keys_hold():
  """Sharp scores are held by few keys, blunt ones are not: what the second result is for."""
  q, k, v = kit.Case(B=1, T=100, S=100, N=1, K=1, H=2, h=2).inputs()
  mass = [
    float(hardmax.top_k_attention(q, k, v, top_k=8, scale=s)[1].mean()) for s in (1.0, 8.0, 64.0)
  ]
  assert mass[0] < 0.5 < mass[1] < mass[2] <= 1.0


def test_what_nobody_may_see_is_zero():
  q, k, v = planar(T=20)
  for form in ("tiled", "reference"):

    def early(v, form=form):
      out, winners = hardmax.hardmax_attention(
        q, k, v, masks.causal(-4), implementation=form, return_residual=True
      )
      return out[:, :4].sum(), (out[:, :4], winners.last[:, :4])

    (_, (out, last)), dv = jax.jit(jax.value_and_grad(early, has_aux=True))(v)
    assert not np.asarray(out).any() and (np.asarray(last) == -1).all()
    assert not np.asarray(dv).any()


def test_decoding_with_a_softmax_over_the_best():
  """With `top_k` as without: prefill and a step give what the parallel form does."""
  q, k, v = kit.Case(T=12, S=12).inputs()
  sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "value_dim": 8, "max_length": 12}
  state = hardmax.init_state(2, **sizes, top_k=3)
  state, first = jax.jit(functools.partial(hardmax.prefill, top_k=3))(
    state, *(x[:, :11] for x in (q, k, v))
  )
  _, last = jax.jit(functools.partial(hardmax.step, top_k=3))(state, *(x[:, 11] for x in (q, k, v)))
  out = jnp.concatenate([first, last[:, None]], 1)
  kit.assert_close("out", out, jax.jit(functools.partial(hardmax.attend, top_k=3))(q, k, v))


def test_calls_that_are_wrong_or_impossible():
  q, k, v = planar(T=20)
  wide = jnp.concatenate([q, q], -1)
  attend = hardmax.hardmax_attention
  with pytest.raises(ValueError, match="ties='latst' is unknown; did you mean 'latest'"):
    attend(q, k, v, ties="latst")
  with pytest.raises(NotImplementedError, match="head width is 4, not 2"):
    attend(wide, wide, v, implementation="bulk")
  with pytest.raises(NotImplementedError, match="not Band, T=19, S=20"):
    attend(q[:, :19], k, v, is_causal=True, implementation="bulk")
  with pytest.raises(ValueError, match="top_k must be an integer of at least 1, not 0"):
    hardmax.top_k_attention(q, k, v, top_k=0)
  with pytest.raises(ValueError, match="top_k must be an integer of at least 1, not 2.0"):
    hardmax.top_k_attention(q, k, v, top_k=2.0)
  with pytest.raises(ValueError, match="candidates must be an integer of at least 1, not -1"):
    attend(q, k, v, straight_through=1.0, candidates=-1)
  with pytest.raises(ValueError, match="cells must be an integer of at least 1, not 0"):
    hardmax.direction_grid_attention(*(jnp.zeros((4, 1, 3)),) * 3, cells=0)
  state = hardmax.init_state(1, num_heads=1, num_kv_heads=1, head_dim=2, value_dim=3, max_length=4)
  with pytest.raises(ValueError, match="ties='frist' is unknown"):
    hardmax.step(state, *(x[:, 0] for x in (q, k, v)), ties="frist")
  with pytest.raises(ValueError, match=r"query \[1, 20, 1, 4\], key \[1, 20, 1, 2\]"):
    hardmax.nearest_key_attention(wide, k, v)
  with pytest.raises(ValueError, match=r"mask must broadcast.*20, 20\], not \[3, 20\]"):
    attend(q, k, v, jnp.ones((3, 20), bool))


def test_what_runs():
  """Tiles below the crossover, bulk above it for planar causal calls, tiles for all others."""
  explain = functools.partial(attention.explain, hardmax.hardmax_attention)
  array = lambda T, H: (jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32),) * 3
  long = 2 * hardmax.CROSSOVER
  assert "runs 'tiled'" in explain(*array(64, 2), is_causal=True)
  assert "runs 'bulk'" in explain(*array(long, 2), is_causal=True)
  assert "runs 'tiled'" in explain(*array(long, 4), is_causal=True)
  few, many = array(64, 2)[0], array(2**20, 2)[0]
  assert "tiles are faster: 127" in explain(few, many, many)
  assert "tiles are faster: 127" in explain(many, few, few)
  assert "runs 'tiled'" in explain(*array(long, 2), mask=masks.sliding_window(9))
  explain = functools.partial(attention.explain, hardmax.top_k_attention, top_k=8)
  assert explain(*array(long, 2), is_causal=True).startswith("top_k_attention runs 'hulls'")
  assert "not 'hulls': its keys lie in a plane" in explain(*array(long, 3), is_causal=True)


@pytest.mark.parametrize(
  ("name", "kind", "platform"), [("hopper", "NVIDIA H200", "gpu"), ("tpu", "TPU v5 lite", "tpu")]
)
def test_what_runs_on_a_chip(name, kind, platform):
  """Its kernel, unless the call is too wide, has arrays in its mask, is float64, or so long that
  `bulk` does less.
  """
  explain = functools.partial(attention.explain, hardmax.hardmax_attention)
  array = lambda T, H, dtype="float32": (jax.ShapeDtypeStruct((1, T, 1, H), dtype),) * 3
  ids = jnp.zeros((1, 64), jnp.int32)
  with kit.pretend(kind, platform):
    assert f"runs {name!r}" in explain(*array(2 * hardmax.CROSSOVER, 2), is_causal=True)
    assert f"runs {name!r}" in explain(*array(64, 8), mask=masks.sliding_window(9))
    long = explain(*array(hardmax.KERNEL_CROSSOVER, 2), is_causal=True)
    assert "runs 'bulk'" in long and "has less to do: 131072" in long
    assert f"runs {name!r}" in explain(*array(hardmax.KERNEL_CROSSOVER, 3), is_causal=True)
    assert "head_dim 9 is more than 8" in explain(*array(64, 9))
    assert "not of arrays as in Segments" in explain(*array(64, 2), mask=masks.segments(ids))
    with kit.double():
      assert "the query is float64" in explain(*array(64, 2, "float64"))
  with pytest.raises(NotImplementedError, match=f"'{name}' cannot run this call: it needs a"):
    hardmax.hardmax_attention(*planar(T=20), implementation=name)


def test_a_grid_of_directions_reads_nothing_for_a_nan():
  q, k, _ = planar()
  grid = jax.jit(functools.partial(hardmax.direction_grid_attention, cells=2))
  q, k = (jnp.concatenate([x, x[..., :1]], -1) for x in (q, k))
  out, index = grid(q, k.at[0, 0].set(jnp.nan), k)
  assert index[0, 0, 0] == -1 and not np.asarray(out[0, 0]).any()


def test_a_mean_of_halves_is_no_sum_of_halves():
  """1000 ties of 100 in float16, whose sum is beyond its numbers; a step is a prefill of one."""
  sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "value_dim": 1, "max_length": 1000}
  state = hardmax.init_state(1, dtype=jnp.float16, **sizes)
  state = state._replace(value=state.value + 100, length=state.length + 999)
  one, value = jnp.zeros((1, 1, 2), jnp.float16), jnp.full((1, 1, 1), 100, jnp.float16)
  _, out = hardmax.step(state, one, one, value)
  kit.assert_same("out", out, value)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"S": 0}], ids=str)
def test_nothing_to_read_or_nobody_to_read_it(sizes):
  q, k, v = kit.Case(**sizes).inputs()
  out, winners = hardmax.hardmax_attention(q, k, v, straight_through=1.0, return_residual=True)
  soft, mass = hardmax.top_k_attention(q, k, v, top_k=3)
  assert out.shape == soft.shape == (*q.shape[:3], 8) and mass.shape == q.shape[:3]
  assert not any(np.asarray(x).any() for x in (out, soft, mass, winners.count))
  assert (np.asarray(winners.last) == -1).all()
