"""Masks: pictures by eye, element answers against plain Python, block answers against element
answers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attention import masks
from attention.masks import Span
from attention.parts import Part

PICTURES = {
  "causal": (masks.causal(), "#... ##.. ###. ####"),
  "causal offset": (masks.causal(1), "##.. ###. #### ####"),
  "causal negative offset": (masks.causal(-1), ".... #... ##.. ###."),
  "window": (masks.sliding_window(1), "#... ##.. .##. ..##"),
  "two-sided window": (masks.sliding_window(1, 1), "##.. ###. .### ..##"),
  "open window": (masks.sliding_window(None, 1), "##.. ###. #### ####"),
  "prefix": (masks.prefix(2) | masks.causal(), "##.. ##.. ###. ####"),
  "chunked": (masks.chunked(2), "##.. ##.. ..## ..##"),
  "strided": (masks.strided(2) & masks.causal(), "#... .#.. #.#. .#.#"),
  "global": (masks.global_tokens(1), "#### #... #... #..."),
  "not": (~masks.causal(), ".### ..## ...# ...."),
  "everything": (masks.everything(), "#### #### #### ####"),
  "function": (masks.from_function(lambda q, k: (q + k) % 3 == 0), "#..# ..#. .#.. #..#"),
  "segments": (masks.segments(jnp.array([[0, 0, 7, 7]])), "##.. ##.. ..## ..##"),
  "positions": (
    masks.positions(jnp.array([[3, 4, 5, 6]]), jnp.array([[4, -1, 2, 3]]), 3),
    "..## #.## #..# #...",
  ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
  mask, picture = PICTURES[name]
  assert mask.show(4).split() == picture.split()


def test_show_is_one_row_of_the_batch():
  mask = masks.lengths(key=jnp.array([1, 3], jnp.int32))
  assert mask.show(1, 4, batch=0) == "#..."
  assert mask.show(1, 4, batch=1) == "###."


WIDTH = 37


def _ring(seed, newest, window):
  """Queries at positions 0 to `newest` and further, keys in no order up to it, some slots empty."""
  draw = np.random.default_rng(seed)
  keys = draw.integers(-1, newest + 1, (2, WIDTH))
  queries = draw.integers(0, newest + 9, (2, WIDTH))
  return masks.positions(jnp.asarray(queries, jnp.int32), jnp.asarray(keys, jnp.int32), window)


def _leaves():
  small = st.integers(0, 9)
  ids = st.lists(st.integers(0, 3), min_size=2 * WIDTH, max_size=2 * WIDTH)
  return st.one_of(
    st.builds(masks.causal, st.integers(-9, 9)),
    st.builds(masks.sliding_window, st.none() | small, st.none() | small),
    st.builds(masks.chunked, st.integers(1, 9)),
    st.builds(masks.strided, st.integers(1, 9)),
    st.builds(masks.global_tokens, small),
    st.builds(masks.prefix, small),
    ids.map(lambda x: masks.segments(jnp.array(x, jnp.int32).reshape(2, WIDTH))),
    st.lists(st.integers(0, WIDTH), min_size=2, max_size=2).map(
      lambda x: masks.lengths(key=jnp.array(x, jnp.int32))
    ),
    st.lists(st.integers(0, WIDTH), min_size=2, max_size=2).map(
      lambda x: masks.lengths(query=jnp.array(x, jnp.int32))
    ),
    st.builds(_ring, st.integers(0, 2**31), st.integers(-1, WIDTH), st.none() | st.integers(1, 9)),
    st.integers(0, 2**31).map(
      lambda seed: masks.from_array(
        jax.random.bernoulli(jax.random.key(seed), 0.5, (2, 3, WIDTH, WIDTH))
      )
    ),
    st.just(masks.from_function(lambda q, k: (q * k) % 5 < 2)),
  )


MASKS = st.recursive(
  _leaves(),
  lambda inner: st.one_of(
    st.builds(lambda a, b: a & b, inner, inner),
    st.builds(lambda a, b: a | b, inner, inner),
    st.builds(lambda a: ~a, inner),
    st.builds(lambda a, offset: a.shift(offset), inner, st.integers(0, 5)),
  ),
  max_leaves=4,
)


PLACES = jnp.arange(WIDTH, dtype=jnp.int32)[None]
HALF_EMPTY = masks.positions(PLACES + WIDTH, jnp.where(PLACES % 8 < 5, PLACES, -1))


@example(mask=HALF_EMPTY, block_q=5, block_k=16)
@example(mask=masks.positions(PLACES + 2, PLACES * 0, 5), block_q=5, block_k=16)
@example(mask=masks.lengths(query=jnp.array([7, WIDTH], jnp.int32)), block_q=5, block_k=4)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(mask=MASKS, block_q=st.sampled_from([1, 5, 16]), block_k=st.sampled_from([4, 16]))
def test_blocks_agree_with_elements(mask, block_q, block_k):
  """Nothing allowed lies in an empty block, nothing forbidden in a full one."""
  array = np.asarray(mask.as_array(WIDTH, WIDTH))
  some, every = (
    np.asarray(x) for x in mask.block(Span.blocks(WIDTH, block_q), Span.blocks(WIDTH, block_k))
  )
  assert some.shape[2:] == every.shape[2:] == (-(-WIDTH // block_q), -(-WIDTH // block_k))
  for i, j in np.ndindex(some.shape[2:]):
    tile = array[:, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
    exists, holds = tile.any((2, 3)), tile.all((2, 3))
    assert not (exists & ~some[:, :, i, j]).any()
    assert not (every[:, :, i, j] & ~holds).any()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(mask=MASKS, b=st.integers(0, 1))
def test_part_is_those_rows_of_the_batch(mask, b):
  whole = np.asarray(mask.as_array(WIDTH, WIDTH))
  part = lambda mask, b: mask.part(Part(2, 1, b), Part(1, 1, 0)).as_array(WIDTH, WIDTH)
  row = np.asarray(jax.jit(part)(mask, jnp.int32(b)))
  np.testing.assert_array_equal(row[0], whole[b if whole.shape[0] > 1 else 0])


def test_part_is_those_heads_of_an_array():
  """Key heads 1 and 3 of 4, each with its two queries; what a mask's heads share stays whole."""
  array = jax.random.bernoulli(jax.random.key(0), 0.5, (2, 8, 5, 7))
  heads = Part(4, 2, jnp.int32(1))
  got = (masks.from_array(array) & masks.lengths(key=jnp.array([7, 7]))).part(Part(2, 2, 0), heads)
  np.testing.assert_array_equal(got.as_array(5, 7), array[:, [2, 3, 6, 7]])
  shared = masks.from_array(array[:, :1]).part(Part(2, 2, 0), heads)
  np.testing.assert_array_equal(shared.as_array(5, 7), array[:, :1])


@pytest.mark.parametrize(
  "mask",
  [
    masks.causal(3),
    masks.sliding_window(5, 2),
    masks.strided(4),
    masks.chunked(6),
    masks.prefix(11),
  ],
  ids=str,
)
def test_static_leaves_are_exact(mask):
  """A leaf's interval answer is not only safe but the best there is: no block is visited in
  vain.
  """
  array = np.asarray(mask.as_array(WIDTH, WIDTH))
  some, every = mask.block(Span.blocks(WIDTH, 7), Span.blocks(WIDTH, 5))
  assert isinstance(some, np.ndarray) and mask.is_static
  for i, j in np.ndindex(some.shape[2:]):
    tile = array[0, 0, i * 7 : (i + 1) * 7, j * 5 : (j + 1) * 5]
    assert tile.any() == some[0, 0, i, j] and tile.all() == every[0, 0, i, j]


def test_sorted_segments_leave_a_block_diagonal():
  ids = jnp.arange(1024, dtype=jnp.int32)[None] // 128
  some, every = masks.segments(ids).block(Span.blocks(1024, 128), Span.blocks(1024, 128))
  np.testing.assert_array_equal(some[0, 0], np.eye(8, dtype=bool))
  np.testing.assert_array_equal(every[0, 0], np.eye(8, dtype=bool))


def test_block_answers_do_not_grow_with_the_pairs():
  """A million tokens: the answers are as many as blocks, and no intermediate is larger than the
  ids.
  """
  T = 2**20

  def answers(ids):
    mask = masks.causal() & masks.segments(ids) & masks.sliding_window(4096)
    return mask.block(Span.blocks(T, 4096), Span.blocks(T, 4096))

  jaxpr = jax.make_jaxpr(answers)(jax.ShapeDtypeStruct((1, T), jnp.int32))
  sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
  assert max(sizes) <= T * 4  # indices of a gather


def test_masks_are_values():
  """Static masks are equal and hash alike, so that they may be static arguments; arrays are
  leaves.
  """
  assert masks.causal(2) & masks.prefix(3) == masks.causal(2) & masks.prefix(3)
  assert hash(masks.sliding_window(4)) == hash(masks.sliding_window(4))
  ids = jnp.zeros((1, 4), jnp.int32)
  assert len(jax.tree.leaves(masks.segments(ids) & masks.causal())) == 2
  assert not (masks.segments(ids) & masks.causal()).is_static


def test_traced_window_is_refused():
  with pytest.raises(TypeError, match="known before anything runs"):
    jax.jit(lambda w: masks.sliding_window(w).as_array(4, 4))(3)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: masks.sliding_window(-1), "left must be at least 0 .* not -1"),
    (lambda: masks.chunked(0), "size must be at least 1, not 0"),
    (lambda: masks.segments(jnp.zeros((3,), jnp.int32)), r"query_ids .* not int32\[3\]"),
    (lambda: masks.from_array(jnp.zeros((3, 3))), r"array must be bool .* not float32\[3, 3\]"),
    (lambda: masks.lengths(key=jnp.zeros((2, 1), jnp.int32)), r"key lengths .* not int32\[2, 1\]"),
  ],
)
def test_bad_masks_say_why(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_mask_combines_with_masks_only():
  with pytest.raises(TypeError, match="not with bool"):
    masks.causal() & True
