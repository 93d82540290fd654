"""Our softmax attention, as the op calls it; its kernels alone while the op does not know them."""

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention import dot_product_attention
from attention.ops import softmax
from experiments.compiling.shapes import FORWARD, Shape, mask, trips, visits
from experiments.compiling.work import Built, Work
from pallas_kernels.flash import Extras, Settings, Visits

# How the kernels are called; one that computes all gradients runs through the keys' visits.
FORWARD_NAMES = r"flash_forward"
D_QUERY_NAMES = r"flash_d_query"
D_KEY_NAMES = r"flash_d_key|flash_backward"


def build(chip: str, shape: Shape, kind: str, settings: Any) -> Built:
  """One pass, for `chip` "hopper" or "tpu"."""
  del settings
  if chip in softmax.IMPLEMENTATIONS:
    return _through_the_op(chip, shape, kind)
  return _kernels_alone(chip, shape, kind)


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


def _through_the_op(chip: str, shape: Shape, kind: str) -> Built:
  *qkv, out = _arrays(shape)
  attend = lambda q, k, v: dot_product_attention(q, k, v, mask=mask(shape), implementation=chip)
  if kind == FORWARD:
    return Built(attend, tuple(qkv), _works(chip, shape, kind))
  gradients = lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out)
  return Built(gradients, (*qkv, out), _works(chip, shape, kind))


def _module(chip: str) -> Any:
  name = f"pallas_kernels.flash_{chip}"
  if importlib.util.find_spec(name) is None:
    raise NotImplementedError(f"there is no {name} yet")
  return importlib.import_module(name)


def _settings(shape: Shape) -> Settings:
  def rule(q_idx, k_idx, q_info, k_info, dense):
    del dense
    allowed = k_idx <= q_idx
    if shape.window is not None:
      allowed = allowed & (k_idx > q_idx - shape.window)
    if shape.documents > 1:
      allowed = allowed & (q_info[0] == k_info[0])
    return allowed

  return Settings(scale=shape.H**-0.5, logit_cap=None, dropout_rate=0.0, rule=rule)


def _blocks(chip: str, shape: Shape) -> Any:
  q, k, v, _ = _arrays(shape)
  return _module(chip).blocks(q.shape, k.shape, v.shape, jnp.bfloat16, _settings(shape))


def _visits(shape: Shape, block: tuple[int, int], *, by_key: bool) -> Any:
  """The shapes of what the op would compute: the same for every head."""
  some, _ = visits(shape, *block)
  if by_key:
    some = some.T
  rows, most = some.shape[0], int(np.max(some.sum(1)))
  array: Any = lambda *tail: jax.ShapeDtypeStruct((1, 1, rows, *tail), jnp.int32)
  return Visits(order=array(most), full=array(), active=array())


def _kernels_alone(chip: str, shape: Shape, kind: str) -> Built:
  kernels, settings = _module(chip), _settings(shape)
  q, k, v, out = _arrays(shape)
  document: Any = jax.ShapeDtypeStruct((1, shape.T), jnp.int32)
  ids = (document,) if shape.documents > 1 else ()
  extras = Extras(q_info=ids, k_info=ids)
  if reason := kernels.unsupported(q, k, v, extras, settings):
    raise NotImplementedError(reason)
  sizes, works = _blocks(chip, shape), _works(chip, shape, kind)
  by_query = _visits(shape, sizes.forward, by_key=False)
  if kind == FORWARD:
    forward = lambda q, k, v, extras, seen: kernels.forward(q, k, v, extras, settings, seen)
    return Built(forward, (q, k, v, extras, by_query), works)
  row = jax.ShapeDtypeStruct((1, shape.N, shape.T), jnp.float32)
  backward = lambda q, k, v, d_out, lse, delta, extras, by_query, by_key: kernels.backward(
    q, k, v, d_out, lse, delta, extras, settings, by_query, by_key
  )
  seen = (
    _visits(shape, sizes.d_query, by_key=False),
    _visits(shape, sizes.d_key, by_key=True),
  )
  return Built(backward, (q, k, v, out, row, row, extras, *seen), works)
