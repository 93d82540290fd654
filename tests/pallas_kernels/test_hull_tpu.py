"""Trees on a TPU, interpreted with a race detector: what they read is what the loops read."""

import functools

import hardmax_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import kit
from attention import chips, hull
from pallas_kernels import aot, hull_tpu


@pytest.fixture(autouse=True)
def on_a_tpu(monkeypatch):
  """A TPU, as far as anyone asks: states are laid out for it."""
  monkeypatch.setattr(chips, "current", lambda: chips.Chip("tpu", "TPU v5 lite"))


@pytest.mark.parametrize("ties", ["average", "latest"])
def test_it_reads_what_the_loops_read(ties):
  interpreted = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
  hardmax_kit.check_hull("tpu", ties, 13, interpreted)


def test_no_row_holds_nodes_of_two_trees():
  """Or two keys would write one row in one turn."""
  state = hull.init_state(1, num_heads=2, num_kv_heads=2, value_dim=1, max_length=40)
  assert state.capacity == 40 and state.size >= 41
  first = np.arange(4) * state.size * state.stride
  assert not (first % hull_tpu.LANES).any() and state.nodes.shape[0] % hull_tpu.LANES == 0
  assert hull_tpu.LANES % state.stride == 0  # nor does a node lie in two


def test_what_it_refuses(monkeypatch):
  x = jnp.zeros((1, 600, 2))
  make = functools.partial(hull.init_state, 1, num_heads=600, num_kv_heads=600, max_length=1)
  with pytest.raises(NotImplementedError, match="1200 trees and 600 queries are more walks than"):
    hull.step(make(value_dim=2), x, x, x, implementation="tpu")
  with monkeypatch.context() as patch:
    patch.setattr(chips, "current", lambda: chips.Chip("cpu", "cpu"))
    state = make(value_dim=2)
  with pytest.raises(NotImplementedError, match="the state was not made on a TPU"):
    hull.step(state, x, x, x, implementation="tpu")


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
def test_lowers_for_the_chip_and_writes_in_place(chip):
  kit.needs_compiler(chip)
  hardmax_kit.check_in_place(chip, "tpu")


@pytest.mark.parametrize("heads", [(340, 340), (680, 170)])
def test_the_most_walks_fit_and_lowers_for_the_chip(heads):
  """Scalar memory holds what is not refused."""
  kit.needs_compiler("v5e")
  queries, keys = heads
  assert hull_tpu.unsupported(2 * keys, queries) is None
  assert hull_tpu.unsupported(2 * keys + 4, queries + 4)
  make = functools.partial(hull.init_state, 1, num_heads=queries, num_kv_heads=keys, value_dim=2)
  state = jax.eval_shape(functools.partial(make, max_length=1000))
  q, k = (jax.ShapeDtypeStruct((1, n, 2), jnp.float32) for n in heads)
  aot.compile_for(
    aot.CHIPS["v5e"], functools.partial(hull.step, implementation="tpu"), state, q, k, k
  )
