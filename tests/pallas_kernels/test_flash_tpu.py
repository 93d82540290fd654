"""The TPU kernels in the interpreter, with races reported and fresh memory full of NaN, against the
equation in float64: outputs and every gradient, by name.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_kit
import kit
from attention import masks
from flash_kit import Problem, causal, window
from pallas_kernels import aot, flash, flash_tpu, flash_tpu_tiles

CASE = kit.Case(B=1, T=200, S=200, N=2, K=1, H=64, h=64)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
  with flash_kit.tpu_interpreter(monkeypatch):
    yield


check = functools.partial(flash_kit.check, flash_tpu)


def normal(*shape, seed=0):
  return kit.normal(jax.random.key(seed), *shape)


def test_several_blocks():
  check(Problem(CASE._replace(T=300, S=300), causal()))


@pytest.mark.parametrize(
  "T, S, mask",
  [
    (1, 200, causal(199)),
    (7, 130, window(3, 40)),
    (200, 63, causal(-20)),  # The first 20 queries see nothing, key blocks beyond the text neither.
  ],
)
def test_odd_lengths_and_offsets(T, S, mask):
  check(Problem(kit.Case(B=2, T=T, S=S, N=2, K=2, H=40, h=72), mask))


def test_segments_by_their_ids():
  """Unaligned documents, other ones in each row."""
  ids = jnp.stack([jnp.arange(260) // 97, jnp.arange(260) // 31]).astype(jnp.int32)
  mask = flash_kit.segments(ids, ids, causal=True)
  check(Problem(CASE._replace(B=2, T=260, S=260), mask))


def test_dense_masks_of_one_query_or_one_key():
  """A row of keys and a row of queries, neither of them ever a T x S array."""
  make = kit.keys(5)
  keys, queries = (jax.random.bernoulli(next(make), 0.6, (2, 1, 200, 1)) for _ in range(2))
  keys = keys.swapaxes(2, 3)
  rule = lambda q_idx, k_idx, q_info, k_info, dense: dense[0] & dense[1]
  mask = masks.from_array(jnp.broadcast_to(keys & queries, (2, 1, 200, 200)))
  check(Problem(CASE._replace(B=2), flash_kit.Lowered(mask, rule, dense=(keys, queries))))


_LEAVES = st.one_of(
  st.integers(-150, 150).map(masks.causal),
  st.tuples(st.integers(0, 150), st.integers(0, 150)).map(lambda x: masks.sliding_window(*x)),
  st.integers(1, 200).map(masks.chunked),
  st.integers(0, 200).map(masks.prefix),
  st.integers(1, 9).map(masks.strided),
)
_MASKS = st.recursive(
  _LEAVES,
  lambda inner: st.one_of(
    st.tuples(inner, inner).map(lambda x: x[0] & x[1]),
    st.tuples(inner, inner).map(lambda x: x[0] | x[1]),
    inner.map(lambda x: ~x),
  ),
  max_leaves=4,
)


@hypothesis.settings(
  max_examples=3,
  derandomize=True,
  deadline=None,
  phases=[hypothesis.Phase.generate],
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(_MASKS, st.integers(1, 300), st.integers(1, 300))
def test_any_mask(mask, T, S):
  case = kit.Case(B=1, T=T, S=S, N=1, K=1, H=16, h=16)
  check(Problem(case, flash_kit.dense(mask, T, S)), least=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_modifiers_together(dtype):
  """Cap, bias, slopes, sinks, dropout, shared keys, h != H, a mask: and a gradient for each."""
  case = kit.Case(B=2, T=140, S=200, N=2, K=1, H=48, h=80, dtype=dtype)
  problem = Problem(
    case,
    causal(30),
    bias=normal(1, 2, 140, 200),
    alibi_slopes=jnp.array([0.02, 0.3]),
    sinks=jnp.array([2.0, -3.0]),
    rate=0.2,
    cap=4.0,
  )
  check(problem, factor=2.0)  # Each modifier rounds once more, and 1 - tanh^2 cancels.


def test_dropout_keeps_what_it_says():
  check(Problem(CASE._replace(B=2, T=140, S=140), causal(), rate=0.9))


def test_sinks_alone():
  check(Problem(CASE._replace(T=140, S=140), causal(-30), sinks=jnp.array([0.5, -3.0])))


def test_a_bias_of_minus_infinity_masks_where_the_mask_is_full():
  """Keys that nobody sees, the whole first block among them."""
  q, k, v = CASE._replace(T=16, S=140, N=1).inputs()
  extras = flash.Extras(bias=jnp.zeros((1, 1, 1, 140)).at[..., :130].set(-jnp.inf))
  visits = flash_kit.visits(masks.prefix(140), 16, 140, (128, 128))
  settings = flash.Settings(0.125, None, 0.0, lambda q_idx, k_idx, *_: k_idx < 140)
  out, *_ = flash_tpu.forward(q, k, v, extras, settings, visits)
  kit.assert_close("out", out, jax.nn.dot_product_attention(q, k[:, 130:], v[:, 130:]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_logits(dtype):
  """Scores of a thousand: the softmax is nearly hard, and everything stays finite."""
  problem = Problem(CASE._replace(T=130, S=130, dtype=dtype), causal(), logits=300.0)
  # The scores' own rounding, 2^-24 of a thousand, is what their exponential is off by.
  check(problem, factor=100.0 if dtype == "float32" else 4.0)


def test_what_no_visit_reaches_may_be_nan():
  """Keys and values that no query sees, queries that see no key: NaN there changes nothing."""
  mask = flash_kit.by_index(
    masks.prefix(128) & ~masks.lengths(query=jnp.array([128])), lambda q, k: (k < 128) & (q >= 128)
  )
  problem = Problem(CASE._replace(T=256, S=256), mask)
  clean = problem.inputs()
  dirty = clean | {name: clean[name].at[:, 128:].set(jnp.nan) for name in "kv"}
  dirty |= {name: clean[name].at[:, :128].set(jnp.nan) for name in ("q", "d_out")}
  found, want = (flash_kit.run(flash_tpu, problem, x) for x in (dirty, clean))
  for name in want:
    kit.assert_same(name, found[name], want[name])
    assert not np.isnan(found[name]).any(), name


def test_two_runs_and_traced_visits_give_the_same_bits():
  problem = Problem(CASE, causal(), bias=normal(1, 1, 1, 200))
  found = [flash_kit.run(flash_tpu, problem), flash_kit.run(flash_tpu, problem, traced=True)]
  for name in found[0]:
    kit.assert_same(name, *(x[name] for x in found))


SETTINGS = flash.Settings(1.0, None, 0.0, lambda q, k, *_: k <= q)


@pytest.mark.parametrize(
  "case, extras, message",
  [
    (CASE._replace(dtype="float16"), flash.Extras(), "float16 is neither float32 nor bfloat16"),
    (CASE._replace(H=600), flash.Extras(), "head_dim 600 is more than 512"),
    (
      CASE._replace(N=40),
      flash.Extras(dense=(jnp.ones((1, 40, 200, 200), bool),)),
      "40 heads per key head, each with a mask of its own, are more than 32",
    ),
  ],
)
def test_what_is_refused(case, extras, message):
  assert flash_tpu.unsupported(*case.inputs(), extras, SETTINGS) == message


def test_wide_heads_have_small_blocks_where_matrix_units_are_small(monkeypatch):
  monkeypatch.undo()
  wide = (1, 4096, 1, 256)
  sides = {}
  for chip in ("v5e", "v5p", "v6e", "tpu7x"):
    with aot.target(aot.CHIPS[chip]):
      sides[chip] = flash_tpu.blocks(wide, wide, wide, jnp.bfloat16, SETTINGS).d_key
  assert sides["v5e"] == sides["v5p"] == (512, 512)
  assert sides["v6e"] == sides["tpu7x"] == (1024, 1024)


def test_long_texts_have_fewer_larger_blocks(monkeypatch):
  """The list of steps has to fit the scalar memory; where it cannot, the call is refused."""
  monkeypatch.undo()
  q = lambda length: jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16)
  for T, S in ((2**15, 2**15), (2**18, 2**18), (2**20, 2**20), (2**22, 2**10), (2**10, 2**22)):
    sizes = flash_tpu.blocks(q(T).shape, q(S).shape, q(S).shape, jnp.bfloat16, SETTINGS)
    for block_q, block_k in (sizes.forward, sizes.d_key):
      assert (T / block_q) * (S / block_k) <= 2**17 and max(T / block_q, S / block_k) <= 2**11
    assert flash_tpu.unsupported(q(T), q(S), q(S), flash.Extras(), SETTINGS) is None
  assert flash_tpu.unsupported(q(2**21), q(2**21), q(2**21), flash.Extras(), SETTINGS) == (
    "262144 blocks of scores (1 masks, T=2097152, S=2097152) are more than 131072"
  )


def test_wide_heads_have_no_blocks_that_do_not_fit(monkeypatch):
  """Those that the compilers for TPUs refuse are not made, and where there would be too many that
  they take, the call is refused.
  """
  monkeypatch.undo()
  ask = lambda length, width, dtype: jax.ShapeDtypeStruct((1, length, 1, width), dtype)
  for q, block in (
    (ask(2**19, 256, jnp.float32), (2048, 1024)),
    (ask(2**20, 256, jnp.bfloat16), (4096, 2048)),
  ):
    assert flash_tpu.blocks(q.shape, q.shape, q.shape, q.dtype, SETTINGS).d_key == block
    assert flash_tpu.unsupported(q, q, q, flash.Extras(), SETTINGS) is None
  for q in (ask(2**20, 256, jnp.float32), ask(2**20, 512, jnp.bfloat16)):
    reason = flash_tpu.unsupported(q, q, q, flash.Extras(), SETTINGS)
    assert reason and "(1 masks, T=1048576, S=1048576) are more than 131072" in reason


def test_seeds_share_the_scalar_memory_with_the_steps():
  q = jax.ShapeDtypeStruct((8192, 128, 32, 64), jnp.bfloat16)
  extras = flash.Extras(dropout_seeds=jnp.zeros((8192, 32), jnp.int32))
  assert flash_tpu.unsupported(q, q, q, flash.Extras(), SETTINGS) is None
  assert flash_tpu.unsupported(q, q, q, extras, SETTINGS) == (
    "1 blocks of scores and 262144 seeds of dropout are more than 196608"
  )


def test_a_block_of_several_pieces(monkeypatch):
  """As those of very long texts are."""
  monkeypatch.setattr(flash_tpu_tiles, "UNROLLED", 128)
  monkeypatch.setattr(flash_tpu_tiles, "part", lambda side, most: 128)
  monkeypatch.setattr(flash_tpu, "_most", lambda width, dtype: ((256, 256),) * 3)
  check(Problem(CASE._replace(N=1), causal()))
