"""Dropout: its bits against NumPy, its meaning in every implementation, its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kit
from attention import dot_product_attention, make_dropout, masks
from attention.dropout import kept_array

CASE = kit.Case(B=2, T=37, S=50, N=4, K=2, H=8, h=12)
DROPOUT = make_dropout(0.3, jax.random.key(4), CASE.B, CASE.N)


def _mixed(x):
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
  return x ^ (x >> np.uint32(16))


def test_bits_are_those_of_the_definition():
  """In NumPy, with unsigned integers; the bits are part of the contract and may never change."""
  seeds = np.asarray(DROPOUT.seeds).view(np.uint32)[..., None, None]
  q_idx, k_idx = np.arange(37, dtype=np.uint32)[:, None], np.arange(50, dtype=np.uint32)[None]
  bits = _mixed(_mixed(seeds + q_idx * np.uint32(0x9E3779B9)) ^ (k_idx * np.uint32(0x85EBCA6B)))
  np.testing.assert_array_equal(kept_array(DROPOUT, 37, 50), (bits >> 8) >= round(0.3 * 2**24))


def test_seeds_are_the_same_where_numbers_may_be_double():
  with kit.double():
    seeds = make_dropout(0.3, jax.random.key(4), CASE.B, CASE.N).seeds
  np.testing.assert_array_equal(seeds, DROPOUT.seeds)


def _run(implementation, q, k, v, dropout=DROPOUT, **options):
  return dot_product_attention(
    q, k, v, mask=masks.causal(13), dropout=dropout, implementation=implementation, **options
  )


@pytest.mark.parametrize("implementation", ["reference", "xla", "tiled"])
def test_output_is_that_of_the_kept_probabilities(implementation):
  """And the log-sum-exp is that of all of them."""
  q, k, v = CASE.inputs()
  out, lse = jax.jit(lambda *x: _run(implementation, *x, return_residual=True))(q, k, v)
  allowed = masks.causal(13).as_array(CASE.T, CASE.S)
  _, all_lse = kit.softmax_attention(q, k, v, allowed)
  kit.assert_close("lse", lse, all_lse)
  kept = np.asarray(kept_array(DROPOUT, CASE.T, CASE.S)) & np.asarray(allowed)
  part, part_lse = kit.softmax_attention(q, k, v, kept)
  share = np.exp(np.where(np.isfinite(part_lse), part_lse, -np.inf) - all_lse)[..., None]
  kit.assert_close("out", out, part * share / 0.7, factor=2)


@pytest.mark.parametrize("implementation", ["xla", "tiled"])
def test_gradients_by_name(implementation):
  q, k, v = CASE.inputs()

  def gradients(implementation, *x):
    loss = lambda *x: jnp.sin(_run(implementation, *x)).sum()
    return dict(zip(("dq", "dk", "dv"), jax.grad(loss, (0, 1, 2))(*x), strict=True))

  actual = jax.jit(lambda *x: gradients(implementation, *x))(q, k, v)
  with kit.double():
    expected = jax.tree.map(np.asarray, gradients("reference", *kit.to_double((q, k, v))))
  kit.assert_trees_close(actual, expected, factor=2)


def test_sharded_rows_and_heads_drop_the_same():
  case = kit.Case(B=4, T=24, S=24)
  q, k, v = case.inputs()
  dropout = make_dropout(0.5, jax.random.key(1), case.B, case.N)
  mesh = jax.make_mesh((4, 2), ("rows", "heads"))
  where, seeds = P("rows", None, "heads"), P("rows", "heads")
  attend = lambda q, k, v, dropout: _run("tiled", q, k, v, dropout)
  sharded = jax.shard_map(attend, mesh=mesh, in_specs=(where, where, where, seeds), out_specs=where)
  specs = (where, where, where, seeds)
  inputs = jax.device_put((q, k, v, dropout), tuple(jax.NamedSharding(mesh, s) for s in specs))
  kit.assert_close("out", jax.jit(sharded)(*inputs), attend(q, k, v, dropout))


def test_no_dropout_is_no_dropout():
  q, k, v = CASE.inputs()
  none = make_dropout(0.0, jax.random.key(0), CASE.B, CASE.N)
  kit.assert_same("out", _run("xla", q, k, v, none), _run("xla", q, k, v, None))


def test_bad_rates_and_seeds_say_why():
  with pytest.raises(ValueError, match=r"\[0, 1\), not 1.0"):
    make_dropout(1.0, jax.random.key(0), 2, 2)
  q, k, v = CASE.inputs()
  with pytest.raises(ValueError, match=r"seeds of dropout .* \[2, 4\], not \[3, 4\]"):
    _run("xla", q, k, v, make_dropout(0.3, jax.random.key(0), 3, 4))
