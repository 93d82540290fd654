"""What is the backward pass's own: dq that comes in parts, dk and dv over heads with own masks."""

import jax.numpy as jnp
import pytest

import flash_kit
import kit
from attention import masks
from flash_kit import Problem
from pallas_kernels import flash_tpu


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
  with flash_kit.tpu_interpreter(monkeypatch):
    yield


def test_a_window_visits_the_same_queries_twice_in_a_row():
  """Then dq of the second visit is added to what is still on its way to memory."""
  flash_kit.check(
    flash_tpu, Problem(kit.Case(B=1, T=384, S=384, N=2, K=2, H=64, h=64), flash_kit.window(100, 0))
  )


def test_heads_with_masks_of_their_own():
  """Four heads, two key heads: the key heads' steps visit each head's blocks in turn."""
  bands = [masks.causal(), masks.sliding_window(10, 3), masks.chunked(40), masks.strided(5)]
  arrays = jnp.concatenate([mask.as_array(200, 200) for mask in bands], axis=1)
  mask = flash_kit.dense(masks.from_array(arrays), 200, 200)
  flash_kit.check(flash_tpu, Problem(kit.Case(B=1, T=200, S=200, N=4, K=2, H=64, h=64), mask))
