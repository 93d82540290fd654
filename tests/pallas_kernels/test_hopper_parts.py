"""float32 as three bfloat16: exact apart, and its products as good as float32's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kit
from pallas_kernels import hopper, hopper_parts


def _numbers():
  """Of every size that three bfloat16 can hold, ones that round up among them, and 0."""
  make = kit.keys(0)
  x = jax.random.normal(next(make), (64, 64)) * 2.0 ** jax.random.randint(
    next(make), (64, 64), -90, 120
  ).astype(jnp.float32)
  return x.at[0, 0].set(0.0).at[0, 1].set(float(np.nextafter(np.float32(2), np.float32(0))))


@pytest.mark.parametrize("way", ["cut", "split"])
def test_parts_add_up_to_the_number(way):
  """To the bit, compiled too: what the first part leaves must not be simplified to nothing."""
  x = _numbers()
  parts = jax.jit(hopper_parts.cut)(x) if way == "cut" else hopper_parts.split(x, 3)
  assert len(parts) == hopper_parts.count(x.dtype) and parts[0].dtype == jnp.bfloat16
  assert np.asarray(parts[2]).any()
  kit.assert_same("sum", hopper_parts.whole(parts), x)


def test_bfloat16_is_its_own_part():
  x = _numbers().astype(jnp.bfloat16)
  (part,) = hopper_parts.cut(x)
  assert part is x and hopper_parts.dtype((part,)) == jnp.bfloat16


@pytest.mark.parametrize("left", ["shared", "fresh", "registers"])
def test_a_product_is_as_good_as_float32(left):
  """Beside float64, where one bfloat16 product is wrong by 2e-3."""
  make = kit.keys(1)
  a, b = (jax.random.normal(next(make), (64, 64)) for _ in range(2))

  def body(a_gmem, b_gmem, out_gmem, a_buffers, b_buffers):
    a_smem, b_smem = hopper_parts.at(a_buffers, 0), hopper_parts.at(b_buffers, 0)
    x = plgpu.load(a_gmem, layout=hopper.TILE)
    hopper_parts.store(plgpu.load(b_gmem, layout=hopper.TILE), b_smem)
    hopper_parts.store(x, a_smem)
    plgpu.commit_smem()
    if left == "shared":
      out_gmem[...] = hopper_parts.multiply(a_smem, b_smem, on_chip=False)
    elif left == "fresh":
      operands = (hopper_parts.Fresh(x, jnp.int32(0), 0) for x in (a_buffers, b_buffers))
      out_gmem[...] = hopper_parts.multiply(*operands, on_chip=False)
    else:
      out_gmem[...] = hopper_parts.add(hopper.zeros(64, 64), x, b_smem, on_chip=False)

  def scratch(*refs, scratch):
    body(*refs, *scratch)

  tiles = (hopper.matrix(64, 64, jnp.bfloat16)(1),) * 3
  kernel = hopper.launch_alone(
    "product", scratch, {"one": 1}, jax.ShapeDtypeStruct((64, 64), jnp.float32), (tiles, tiles)
  )
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    found = kernel(a, b)
  want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
  kit.assert_close("product", found, want, "float32")
