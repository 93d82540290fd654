"""What the linear-attention kernels of a TPU share, on arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from pallas_kernels import linear_tpu_tiles as tiles


def test_exponents_keep_a_small_decay_after_a_large_one():
  g = np.full((1, 130, 1), -1e-3, np.float32)
  g[0, :64, 0] = -128.0
  rows = jax.jit(lambda g: tiles.numbers(g, 1, 130, 1, 1.0, 0.0))(g)
  assert rows.shape == (1, 1, 2, tiles.NUMBERS, tiles.CHUNK)
  found = jax.jit(tiles.exponents)(rows[0, 0, 0])
  exact = g[0, :128, 0].astype(np.float64) / np.log(2)
  running = np.cumsum(exact)
  i, j = np.tril_indices(128)
  between = np.asarray(found.between, np.float64)[i, j]
  np.testing.assert_allclose(between, running[i] - running[j], rtol=1e-6, atol=1e-12)
  assert np.isneginf(np.asarray(found.between)[np.triu_indices(128, 1)]).all()
  kit.assert_close("read", found.read[:, 0], running)
  kit.assert_close("write", found.write[64:, 0], (running[-1] - running)[64:])
  spread = tiles.along(found.read, 256)
  assert spread.shape == (128, 256) and (spread == found.read[:, :1]).all()
  kit.assert_close("total", found.total[0, 0], running[-1])


@pytest.mark.parametrize("contract", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_products_have_their_gradients(contract):
  make = kit.keys()
  shapes = [(5, 7) if axis else (7, 5) for axis in contract]
  x, y = (jax.random.normal(next(make), shape) for shape in shapes)
  plain = lambda x, y: jnp.tensordot(x, y, axes=((contract[0],), (contract[1],)))
  out, pull = jax.vjp(lambda x, y: tiles.product(x, y, contract, jnp.float32), x, y)
  want, plain_pull = jax.vjp(plain, x, y)
  kit.assert_close("product", out, want)
  kit.assert_trees_close(pull(out), plain_pull(want))


@pytest.mark.parametrize(
  "heads, step, blocks",
  [
    ((8, 8, 8), 4, (4, 4, 4)),
    ((8, 2, 4), 4, (4, 1, 2)),
    ((8, 1, 1), 4, (4, 1, 1)),
    ((6, 2, 3), 1, (1, 1, 1)),
    ((3, 1, 1), 3, (3, 1, 1)),
  ],
)
def test_a_step_reads_the_heads_that_its_own_share(heads, step, blocks):
  """Every head of a step finds its own in the block of each array."""
  q, k, v = (jax.ShapeDtypeStruct((1, 200, n, 64), jnp.bfloat16) for n in heads)
  shape = tiles.shape(q, k, v, None, 4)
  assert (shape.step, shape.chunks, shape.M) == (step, 2, 128)
  for ratio, block in zip(shape.ratios, blocks, strict=True):
    spec = shape.tokens(128, ratio)
    assert spec.block_shape == (None, 128, block * 128)
    for n in range(shape.N):
      first = spec.index_map(0, n // step, 0)[2] * block
      assert first + n % step // ratio == n // ratio


def test_more_work_a_head_means_fewer_heads_a_step():
  x = lambda width, dtype: jax.ShapeDtypeStruct((1, 200, 8, width), dtype)
  g = jax.ShapeDtypeStruct((1, 200, 8, 64), jnp.float32)
  step = lambda x, g: tiles.shape(x, x, x, g, 8).step
  assert step(x(64, jnp.bfloat16), None) == 8
  assert step(x(64, jnp.bfloat16), g) == step(x(64, jnp.float32), None) == 4
  assert step(x(200, jnp.float32), g) == 1
