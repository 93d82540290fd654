"""What the gradients alone have: that of the bias, nothing read that is not visited, the same
bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_kit import Call, check, cotangents, half, run

import kit
from attention import masks
from pallas_kernels import flash_hopper_backward, hopper
from pallas_kernels.flash import Extras, Settings, Visits


def _normal(*shape):
  return kit.normal(jax.random.key(3), *shape)


BIASED = {
  "of every head, batch rows share it": Call(
    half(B=2, T=70, S=97), masks.prefix(20) | masks.chunked(32),
    extras=Extras(bias=_normal(1, 2, 70, 97)),
  ),
  "of keys, with slopes": Call(
    half(B=2, T=97, S=70, N=1), masks.sliding_window(30, 40),
    extras=Extras(bias=_normal(2, 1, 1, 70), alibi_slopes=jnp.array([0.5])),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASED)
def test_bias_gradient(name):
  check(BIASED[name])


def test_what_is_not_visited_is_not_read_and_results_repeat():
  """NaN in the blocks that no visit names spoils nothing, in the forward pass and in the backward;
  two runs have the same bits.
  """
  call = Call(
    half(T=256, S=256, N=1),
    masks.lengths(query=jnp.array([128], jnp.int32)) & masks.prefix(128) & masks.causal(),
  )
  q, k, v = call.inputs()
  d_out, d_lse = cotangents(q, v)
  want = run(call, q, k, v, d_out, d_lse)
  spoil = lambda x: x.at[:, 128:].set(jnp.nan)
  got = run(call, *map(spoil, (q, k, v, d_out)), d_lse.at[:, :, 128:].set(jnp.nan))
  for name in ("out", "lse", "dq", "dk", "dv"):
    kit.assert_same(name, got[name], want[name])
  assert np.isfinite(np.asarray(got["dk"], np.float32)).all()


def test_cuda_has_the_grid_of_a_long_bias(monkeypatch):
  """Its first axis, the grid's last, may have any length; the others 65535."""
  grids = []

  def launch(name, body, plan, *, grid, out_type, scratch):
    grids.append(tuple(grid.values()))
    return lambda *given: jnp.zeros(out_type.shape, out_type.dtype)

  monkeypatch.setattr(hopper, "launch", launch)

  def run(x, row, bias):
    visits = Visits(*(jnp.zeros((1, 1, 256, 256)[:axes], jnp.int32) for axes in (4, 3, 3)))
    given = x, x, x, x, row, row, Extras(bias=bias), Settings(1.0, None, 0.0, lambda *_: True)
    return flash_hopper_backward._d_bias(*given, visits, True)

  like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  jax.eval_shape(run, like(1, 2**15, 1, 128), like(1, 1, 2**15), like(1, 1, 2**15, 2**15))
  (grid,) = grids
  assert grid == (1, 256, 256)


def test_visited_blocks_are_named_once_whatever_follows_them():
  """Entries of the order that mean nothing may be anything, beyond the blocks too."""
  order = jnp.array([[[[2, 0, 2, 99], [1, 3, -7, 1]]]], jnp.int32)
  active = jnp.array([[[2, 1]]], jnp.int32)
  states = flash_hopper_backward.visited(Visits(order, active, active))
  np.testing.assert_array_equal(states, [[[[1, 0, 1, 0], [0, 1, 0, 0]]]])


@pytest.mark.parametrize("H,h", [(32, 32), (64, 64), (128, 128), (192, 128), (256, 256)])
def test_plans_fit_the_shared_memory(H, h):
  """Of one block of threads: 227 KiB, as matrices of 16-bit elements."""
  for plan in flash_hopper_backward.plans("bfloat16", H, h):
    resident = plan.rows * (H + h)
    rings = plan.others * (plan.stages[0] * H + plan.stages[1] * h)
    assert 2 * (resident + rings) <= 227 * 1024, plan
