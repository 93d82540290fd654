"""Linear attention, as its users call it: our kernels, and the form that XLA compiles."""

from typing import Any

import jax
import jax.numpy as jnp

from attention import linear_attention
from attention.ops import linear
from experiments.benchmarks.cases import LinearCase
from experiments.compiling.shapes import BACKWARD, FORWARD, STEP
from experiments.compiling.work import Built, Work
from pallas_kernels import linear_tpu, linear_tpu_backward, linear_tpu_step, linear_tpu_tiles
from pallas_kernels.bundles import Trips

TOKENS = 1024
"""Of a sequence that our TPU kernels are compiled for. More are turns of the same loop, and what
XLA makes of their decays around the kernel takes it minutes.
"""


def build(implementation: str, shape: LinearCase, kind: str, settings: Any) -> Built:
  """One pass by "hopper", "tpu" or "chunked", of the setting's "dtype" or of bfloat16."""
  short = implementation == "tpu" and kind != STEP
  q, g = _arrays(shape, min(shape.T, TOKENS) if short else shape.T)
  q = q.update(dtype=jnp.dtype(settings.get("dtype", q.dtype)))
  works = _works(shape, kind) if implementation == "tpu" else ()
  whole, scale = implementation == "chunked", shape.H**-0.5
  if kind == STEP:
    name = "xla" if whole else implementation

    def token(state, q, k, v, g):
      return linear.step(state, q, k, v, log_decay=g, scale=scale, implementation=name)

    return Built(token, (_state(shape), *(_token(x) for x in (q, q, q, g))), works, whole=whole)

  def attend(q, k, v, g):
    return linear_attention(q, k, v, log_decay=g, scale=scale, implementation=implementation)

  if kind == FORWARD:
    return Built(attend, (q, q, q, g), works, whole=whole)
  gradients = lambda q, k, v, g, d_out: jax.vjp(attend, q, k, v, g)[1](d_out)
  return Built(gradients, (q, q, q, g, q), works, whole=whole)


def _arrays(shape: LinearCase, T: int) -> tuple[Any, Any]:
  """What q, k, v and the output are like, and the decays."""
  lead = (shape.B, T, shape.N)
  width = (shape.H,) if shape.decay == "channel" else ()
  array = jax.ShapeDtypeStruct((*lead, shape.H), jnp.bfloat16)
  return array, jax.ShapeDtypeStruct((*lead, *width), jnp.float32)


def _token(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((array.shape[0], *array.shape[2:]), array.dtype)


def _state(shape: LinearCase) -> Any:
  make = lambda: linear.init_state(
    shape.B, num_heads=shape.N, num_kv_heads=shape.N, head_dim=shape.H, value_dim=shape.H,
    max_length=shape.T,
  )  # fmt: skip
  return jax.eval_shape(make)


def _works(shape: LinearCase, kind: str) -> tuple[Work, ...]:
  """How often our kernels' steps run on a TPU, at the whole length."""
  if kind == STEP:
    steps = shape.B * shape.N // linear_tpu_step.heads_a_step(shape.N)
    return (Work("linear_step", Trips(steps, 0, steps, steps)),)
  q, g = _arrays(shape, shape.T)
  most = linear_tpu_backward.HEADS if kind == BACKWARD else linear_tpu.HEADS
  B, rows, chunks = linear_tpu_tiles.shape(q, q, q, g, most).grid()
  trips = Trips(B * rows * chunks, 0, B * rows, B * rows * chunks, starts_inside=True)
  names = ("linear_states", "linear_backward") if kind == BACKWARD else ("linear_forward",)
  return tuple(Work(name, trips) for name in names)
