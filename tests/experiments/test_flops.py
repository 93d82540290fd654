"""Counting arithmetic: against closed forms, through loops, whatever the implementation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from attention import variants
from attention.modules.config import DecoderConfig
from experiments import flops

A, B = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 16), jnp.float32)
ONE = 2 * 64 * 32 * 16


def test_a_product_is_two_operations_per_multiply_add():
  assert flops.count(jnp.matmul, A, B) == ONE
  batched = lambda a, b: jnp.einsum("nij,njk->nik", a, b)
  many = [jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in (A, B)]
  assert flops.count(batched, *many) == 5 * ONE


def test_a_scan_counts_every_turn():
  def turns(a, b):
    return jax.lax.scan(lambda c, _: (c + (a @ b).sum(), None), 0.0, None, length=10)[0]

  assert flops.count(turns, A, B) == 10 * ONE


def test_what_runs_inside_jit_remat_and_cond_counts():
  assert flops.count(jax.jit(jnp.matmul), A, B) == ONE
  assert flops.count(jax.checkpoint(jnp.matmul), A, B) == ONE
  either = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((64, 16)))
  assert flops.count(either, A, B) == ONE


def test_a_custom_derivative_counts_once():
  product = jax.custom_vjp(jnp.matmul)
  product.defvjp(lambda a, b: (a @ b, (a, b)), lambda r, g: (g @ r[1].T, r[0].T @ g))
  assert flops.count(product, A, B) == ONE
  grad = jax.grad(lambda a, b: product(a, b).sum(), argnums=(0, 1))
  assert flops.count(grad, A, B) == 3 * ONE


def test_a_loop_of_unknown_length_is_refused_and_not_counted_as_nothing():
  def loop(a, b):
    more = lambda carry: carry[0] < a[0, 0]
    return jax.lax.while_loop(more, lambda c: (c[0] + 1, c[1] + (a @ b).sum()), (0.0, 0.0))

  with pytest.raises(ValueError, match="loop"):
    flops.count(loop, A, B)


def test_a_convolution():
  x, kernel = jnp.zeros((2, 3, 10)), jnp.zeros((4, 3, 5))
  convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "VALID")
  assert flops.count(convolve, x, kernel) == 2 * (2 * 4 * 6) * (3 * 5)


def test_shard_map_counts_all_devices():
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4]
  )
  P = jax.sharding.PartitionSpec
  product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
  with jax.set_mesh(mesh):
    rows = jax.device_put(jnp.zeros((64, 32)), P("data"))
    assert flops.count(product, rows, jnp.zeros((32, 16))) == ONE


CONFIG = DecoderConfig(vocab_size=256, num_layers=3, width=64, num_heads=4, mlp_width=96)


def test_a_decoder_by_the_textbook():
  # 2 per weight and token, plus what attention multiplies.
  weights = 3 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 256
  attention = 3 * variants.VARIANTS["softmax"].cost(2, 32, 32, 4, 4, 16, 16).flops
  assert flops.forward(CONFIG, 2, 32) == 2 * weights * 2 * 32 + attention
  assert flops.train_step(CONFIG, 2, 32) == 3 * flops.forward(CONFIG, 2, 32)


def test_a_mixer_with_heads_of_its_own_by_the_textbook():
  """Mamba-2: one head of C and B, 32 wide, is read by 8 heads of values, 16 wide."""
  config = dataclasses.replace(CONFIG, pattern="mamba2")
  mixer = 2 * 64 * 32 + 3 * 64 * 128 + 64 * 8  # C and B; values, gate and back; step sizes
  weights = 3 * (mixer + 3 * 64 * 96) + 64 * 256
  scores_and_states = 32 * (32 + 16) + 2 * 32 * 16  # per token and head, a chunk being all 32
  attention = 3 * 2 * (2 * 32 * 8) * scores_and_states
  assert flops.forward(config, 2, 32) == 2 * weights * 2 * 32 + attention


@pytest.mark.parametrize("pattern", variants.VARIANTS)
def test_every_mechanism_is_counted(pattern):
  config = dataclasses.replace(CONFIG, pattern=pattern)
  free = flops.count(lambda: jnp.zeros(()))
  assert free == 0 < flops.forward(config, 1, 64) < flops.forward(config, 1, 128)


def test_recomputing_costs_time_and_not_model_flops():
  full = dataclasses.replace(CONFIG, remat="full", dtype="bfloat16")
  assert flops.train_step(full, 1, 32) == flops.train_step(CONFIG, 1, 32)


def test_the_peak_of_this_machine_is_measured_once_and_plausible():
  peak = flops.peak()
  assert peak is not None and 1e8 < peak < 1e15
  assert flops.peak() == peak


def test_an_unknown_device_has_no_peak():
  class Device:
    platform, device_kind = "abacus", "beads"

  device: Any = Device()
  assert flops.peak(device) is None


def test_the_longest_name_wins():
  class Device:
    platform, device_kind = "tpu", "TPU v5 lite"

  one = flops.PEAKS["TPU v5 lite"]
  device: Any = Device()
  assert flops.peak(device) == one
  assert flops.peak(device, devices=4) == 4 * one
