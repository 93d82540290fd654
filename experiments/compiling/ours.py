"""Our softmax attention, as its users call it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attention import dot_product_attention, kernels
from attention.lowering import Rule
from experiments.compiling.shapes import FORWARD, Shape, mask, trips
from experiments.compiling.work import Built, Work
from pallas_kernels.flash import Settings

# How the kernels are called; one that computes all gradients runs through the keys' visits.
FORWARD_NAMES = r"flash_forward"
D_QUERY_NAMES = r"flash_d_query"
D_KEY_NAMES = r"flash_d_key|flash_backward"


def build(chip: str, shape: Shape, kind: str, settings: Any) -> Built:
  """One pass, for `chip` "hopper" or "tpu"."""
  del settings
  *qkv, out = _arrays(shape)
  attend = lambda q, k, v: dot_product_attention(q, k, v, mask=mask(shape), implementation=chip)
  if kind == FORWARD:
    return Built(attend, tuple(qkv), _works(chip, shape, kind))
  gradients = lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out)
  return Built(gradients, (*qkv, out), _works(chip, shape, kind))


def _arrays(shape: Shape) -> list[jax.ShapeDtypeStruct]:
  """q, k, v and the output, B T N H."""
  heads = ((shape.N, shape.H), (shape.K, shape.H), (shape.K, shape.h), (shape.N, shape.h))
  return [jax.ShapeDtypeStruct((1, shape.T, *head), jnp.bfloat16) for head in heads]


def _works(chip: str, shape: Shape, kind: str) -> tuple[Work, ...]:
  """How often the kernels run on a TPU; a GPU's time is not predicted."""
  if chip != "tpu":
    return ()
  sizes = _blocks(chip, shape)
  count = functools.partial(trips, shape, all_steps=False)
  if kind == FORWARD:
    return (Work(FORWARD_NAMES, count(*sizes.forward)),)
  return (
    Work(D_QUERY_NAMES, count(*sizes.d_query)),
    Work(D_KEY_NAMES, count(*sizes.d_key, by_key=True)),
  )


def _blocks(chip: str, shape: Shape) -> Any:
  module = kernels.module("flash", chip)
  settings = Settings(scale=shape.H**-0.5, logit_cap=None, dropout_rate=0.0, rule=Rule(None))
  q, k, v, _ = _arrays(shape)
  return module.blocks(q.shape, k.shape, v.shape, jnp.bfloat16, settings)
