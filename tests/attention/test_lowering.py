"""What kernels read of a mask: the rule is the mask, visits are its blocks, nothing is T x S."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attention import lowering, masks
from pallas_kernels import flash

T, S = 45, 51
_RANDOM = np.random.default_rng(0)
_IDS = jnp.asarray(_RANDOM.integers(0, 3, (2, S)).cumsum(1), jnp.int32)
_ARRAY = jnp.asarray(_RANDOM.random((2, 3, T, S)) < 0.5)
_LEAF = st.sampled_from(
  [
    masks.everything(),
    masks.causal(-4),
    masks.sliding_window(7, 2),
    masks.chunked(9),
    masks.strided(4),
    masks.global_tokens(3),
    masks.prefix(21),
    masks.prefix(jnp.array([5, 40], jnp.int32)),
    masks.segments(_IDS[:, :T], _IDS),
    masks.lengths(query=jnp.array([45, 9], jnp.int32), key=jnp.array([13, 51], jnp.int32)),
    masks.positions(_IDS[:, :T] + 20, _IDS - 1, window=9),
    masks.from_array(_ARRAY),
    masks.from_array(_ARRAY[:1, :1, :1]),
    masks.from_function(lambda q, k: (q * 3 + k) % 4 != 0),
    masks.segments(_IDS).shift(6),
    (masks.causal() & masks.sliding_window(9)).shift(jnp.int32(4)),
    masks.from_array(jnp.concatenate([_ARRAY] * 2, 2)).shift(17),
  ]
)
_MASK = st.recursive(
  _LEAF,
  lambda inner: st.one_of(
    st.builds(lambda a, b: a & b, inner, inner),
    st.builds(lambda a, b: a | b, inner, inner),
    st.builds(lambda a: ~a, inner),
  ),
  max_leaves=4,
)


def _elementwise(mask):
  """The whole array by the rule, every operand spread to one tile, as kernels do it."""
  rule, q_info, k_info, dense = lowering.lower(mask, T, S)
  tile = (2, 3, T, S)
  rows = tuple(jnp.broadcast_to(x[:, None, :, None], tile) for x in q_info)
  columns = tuple(jnp.broadcast_to(x[:, None, None, :], tile) for x in k_info)
  q_idx, k_idx = (jax.lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (2, 3))
  dense = tuple(jnp.broadcast_to(x, tile) for x in dense)
  return rule(q_idx, k_idx, rows, columns, dense)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mask=_MASK)
@example(mask=masks.chunked(4).shift(-3))
@example(mask=masks.from_function(lambda q, k: True) & masks.causal())
def test_the_rule_is_the_mask(mask):
  expected = np.broadcast_to(mask.as_array(T, S), (2, 3, T, S))
  np.testing.assert_array_equal(_elementwise(mask), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(mask=_MASK, block_q=st.sampled_from([8, 16, 45]), block_k=st.sampled_from([8, 20, 51]))
def test_visits_miss_nothing_and_full_is_full(mask, block_q, block_k):
  """Each direction: visited blocks hold every allowed pair, full ones hold every pair, and no place
  behind the last key, where a kernel finds what is no key.
  """
  array = np.broadcast_to(mask.as_array(T, S), (2, 3, T, S))
  array = np.pad(array, ((0, 0), (0, 0), (0, 0), (0, -S % block_k)))
  for visits, pairs, (rows, columns) in zip(
    lowering.visits(lowering.cut(mask, S, block_k), T, S, block_q, block_k),
    (array, array.swapaxes(2, 3)),
    ((block_q, block_k), (block_k, block_q)),
    strict=True,
  ):
    order, full, active = (np.asarray(x) for x in visits)
    assert (np.sort(order, -1) == np.arange(order.shape[-1])).all()
    for b, n, i in np.ndindex(2, 3, order.shape[2]):
      at = (b % order.shape[0], n % order.shape[1], i)
      for place, j in enumerate(order[at]):
        block = pairs[b, n, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert block.all() or place >= full[at], "a full block has a hole"
        assert not block.any() or place < active[at], "an allowed pair is not visited"


def test_a_window_visits_a_band():
  by_query, by_key = lowering.visits(masks.sliding_window(63), 1024, 1024, 64, 64)
  np.testing.assert_array_equal(by_query.active[0, 0], [1] + [2] * 15)
  np.testing.assert_array_equal(by_key.active[0, 0], [2] * 15 + [1])


def test_a_rule_is_static():
  """Equal masks make equal rules, whatever their arrays, so that programs are compiled once."""
  make = lambda ids: lowering.lower(masks.segments(ids) & masks.causal(), T, T).rule
  assert make(_IDS[:, :T]) == make(_IDS[:, :T] + 1) and hash(make(_IDS[:, :T]))
  assert make(_IDS[:, :T]) != lowering.lower(masks.causal(), T, T).rule


@pytest.mark.parametrize(
  ("function", "reason"),
  [
    (lambda q, k: (q * 3 + k) % 4 != 0, None),
    (lambda q, k: _IDS[0, q] == _IDS[0, k], "its mask's function holds an array of its own, int"),
    (lambda q, k: jnp.sort(q) >= k, "its mask's function computes sort, which no tile of a ker"),
    (lambda q, k: _ARRAY[0, 0] & (q >= k), "its mask's function raises "),
  ],
)
def test_functions_that_kernels_can_compute(function, reason):
  mask = ~masks.from_function(function) & masks.segments(_IDS)
  found = lowering.unreadable(mask, flash.PRIMITIVES)
  assert found is None if reason is None else found.startswith(reason)


def test_a_million_tokens_need_nothing_of_their_square():
  """Compiled for T = S = 2^20 with documents and a window: memory of the order of the blocks."""
  length, block = 2**20, 1024

  def run(ids):
    mask = masks.causal() & masks.sliding_window(4095) & masks.segments(ids)
    return lowering.lower(mask, length, length)[1:], lowering.visits(
      mask, length, length, block, block
    )

  ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
  analysis = jax.jit(run).lower(ids).compile().memory_analysis()
  blocks = (length // block) ** 2
  used = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
  assert used < 64 * blocks + 64 * length < length**2 / 1000
