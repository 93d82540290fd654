"""Arrays cut into tiles: each tile is the slice that it names, whatever axes the array has."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_hopper_tile
from pallas_kernels.flash import Extras
from pallas_kernels.hopper import ROWS, Plan

PLAN = Plan(warpgroups=2, others=128, stages=(2, 2))
B, N, T, S = 2, 3, 140, 300


@pytest.mark.parametrize("keys_first", [False, True])
@pytest.mark.parametrize("shape", [(B, N, T, S), (1, N, T, 1), (B, 1, 1, S), (1, 1, 1, 1)])
def test_a_tile_is_the_slice_it_names(shape, keys_first):
  x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  operand = flash_hopper_tile.cut(jnp.asarray(x), S, PLAN, keys_first=keys_first)
  whole = np.broadcast_to(x, (B, N, T, S))
  whole = whole.swapaxes(2, 3) if keys_first else whole
  array = np.asarray(operand.array)
  height, width = (S, T) if keys_first else (T, S)
  for b, n, r, c in itertools.product(range(B), range(N), range(-(-height // ROWS)), range(2)):
    part = array[b if array.shape[0] > 1 else 0, n if array.shape[1] > 1 else 0]
    tile = part[r, :, c] if operand.axis is None else part[c if operand.axis else r]
    tile = tile[:, None] if operand.axis == 0 else tile
    want = whole[b, n, r * ROWS : (r + 1) * ROWS, c * PLAN.others : (c + 1) * PLAN.others]
    got = np.broadcast_to(tile, (ROWS, PLAN.others))
    np.testing.assert_array_equal(got[: want.shape[0], : want.shape[1]], want)


def test_every_tile_of_a_block_is_there():
  """A block of queries has two tiles, and the last may lie beyond the array."""
  ids = jnp.zeros((B, T), jnp.int32)
  reads = flash_hopper_tile.reads(Extras(q_info=(ids,)), T, S, PLAN)
  assert reads.q_info[0].array.shape == (B, 1, 4, ROWS)


def test_masks_are_bytes_and_vectors_words():
  dense = tuple(jnp.ones(shape, jnp.bool_) for shape in ((1, 1, T, S), (B, 1, 1, S)))
  whole, keys = flash_hopper_tile.reads(Extras(dense=dense), T, S, PLAN).dense
  assert (whole.array.dtype, whole.axis) == (jnp.int8, None)
  assert (keys.array.dtype, keys.axis) == (jnp.int32, 1)
