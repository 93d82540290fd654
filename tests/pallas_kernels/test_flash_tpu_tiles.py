"""The list of steps against the visits it was made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash, flash_tpu_tiles


def _visits(batch, heads, blocks, others, seed=0):
  """Random ones, some blocks without any; meaningless entries are far outside."""
  random = np.random.default_rng(seed)
  active = random.integers(0, others + 1, (batch, heads, blocks)).astype(np.int32)
  active[:, :, -1] = 0
  full = (active * random.random(active.shape)).astype(np.int32)
  order = np.argsort(random.random((batch, heads, blocks, others)), axis=-1).astype(np.int32)
  order = np.where(np.arange(others) < active[..., None], order, 2**30).astype(np.int32)
  return flash.Visits(*map(jnp.asarray, (order, full, active)))


def _expected(visits, b, n, groups):
  """(row, other, group, full, mixed, first, last) of each step, by two loops."""
  order, full, active = (np.asarray(x[b]) for x in visits)
  found = []
  for row in range(order.shape[1]):
    start = len(found)
    for g in range(groups):
      head = n * groups + g
      for nth in range(max(active[head, row], 1)):
        is_full, is_active = nth < full[head, row], nth < active[head, row]
        other = order[head, row, nth] if is_active else 0
        found.append([row, other, g, is_full, is_active and not is_full, False, False])
    found[start][5] = found[-1][6] = True
  return found


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("batch, heads, groups", [(1, 1, 1), (2, 3, 1), (2, 4, 2), (1, 4, 4)])
def test_steps_are_the_visits_one_after_another(batch, heads, groups, traced):
  visits = _visits(batch, heads, 5, 7)
  make = lambda visits: flash_tpu_tiles.steps(visits, groups)[:2]
  words, length = jax.jit(make)(visits) if traced else make(visits)
  lists = np.asarray(words).reshape(batch, heads // groups, -1)
  longest = 0
  for b, n in np.ndindex(batch, heads // groups):
    want = _expected(visits, b, n, groups)
    longest = max(longest, len(want))
    fields = [flash_tpu_tiles.field(lists[b, n], name) for name in ("row", "other", "group")]
    flags = [flash_tpu_tiles.flag(lists[b, n], x) for x in ("full", "mixed", "first", "last")]
    found = np.stack([np.asarray(x, np.int32) for x in (*fields, *flags)], -1)
    np.testing.assert_array_equal(found[: len(want)], np.asarray(want, np.int32))
    after = found[len(want) :]  # Computes nothing and copies nothing new.
    assert not after[:, 3:].any() and (after[:, :3] == found[len(want) - 1, :3]).all()
  assert int(length) == longest


@pytest.mark.parametrize("dtype, read", [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_a_bias_is_read_as_what_a_tpu_can_load(dtype, read):
  extras = flash.Extras(bias=jnp.ones((1, 1, 1, 200), dtype))
  assert flash_tpu_tiles.modifiers(extras, 200, 200, (128, 128))["bias"].array.dtype == read


def test_a_part_divides_its_side():
  sides = (128, 256, 384, 512, 768, 1024, 4096)
  parts = [flash_tpu_tiles.part(side, 512) for side in sides]
  assert parts == [128, 256, 384, 512, 384, 512, 512]


def test_a_row_is_the_transposed_column():
  column = np.random.default_rng(0).normal(size=(384, 1)).astype(np.float32)
  column[::7] = -np.inf
  row = flash_tpu_tiles.row(jnp.broadcast_to(column, (384, flash_tpu_tiles.LANES)))
  np.testing.assert_array_equal(row, column.T)
