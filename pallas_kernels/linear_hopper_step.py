"""One token of linear attention on Hopper GPUs (sm_90a): the state is read once and written once.

    S <- fade S + k v^T       out = scale q S

One warpgroup per 64 columns of a head's state, 64 rows at a time from global memory to registers
and back to where they were; nothing is multiplied by a tensor core, all is float32. Bound by the
bytes of the state: 8 M h per head, 0.0273 ms for B=32, N=32, M=h=128 at 4.8 TB/s. No chip has run
it yet.

A state whose widths are multiples of 64 changes in place where the caller gives it away: the carry
of a `lax.scan`, or an argument that `jax.jit` was told to donate. Elsewhere XLA copies it first.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import COLUMN, ROW, ROWS, TILE, along
from pallas_kernels.linear_tiles import Array

COLUMNS = 64
"""Of the state, that a warpgroup has."""


class Inputs(NamedTuple):
  """What the kernel reads, float32."""

  q: Any
  k: Any
  """`B heads M`."""
  v: Any
  """`B heads h`."""
  fade: Any
  """exp(g), `B N M`."""
  scale: Any
  """Of the output, `B N COLUMNS`, all alike."""
  state: Any
  """`B N M h`; the kernel also writes it."""


def _kernel(inputs: Inputs, out_gmem, *, scratch):
  del scratch
  b, n, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
  columns, N = pl.ds(part * COLUMNS, COLUMNS), inputs.state.shape[1]
  shape, load = (ROWS, COLUMNS), functools.partial(plgpu.load, optimized=False)
  of = lambda x: (b, lax.div(n, N // x.shape[1]))
  v = along(load(inputs.v.at[(*of(inputs.v), columns)], layout=COLUMN), 1, shape)
  total = hopper.zeros(*shape)
  for first in range(0, inputs.state.shape[2], ROWS):
    rows = pl.ds(first, ROWS)
    row = lambda x, rows=rows: along(load(x.at[(*of(x), rows)], layout=ROW), 0, shape)
    state_gmem = inputs.state.at[b, n, rows, columns]
    state = load(state_gmem, layout=TILE) * row(inputs.fade) + row(inputs.k) * v
    total = total + row(inputs.q) * state
    state_gmem[...] = state
  scale = load(inputs.scale.at[b, n], layout=COLUMN)
  out_gmem.at[b, n, columns][...] = total.sum(axis=0) * scale


def step(inputs: Inputs) -> tuple[Array, Array]:
  """(out `B N h`, state), float32."""
  B, N, _, h = inputs.state.shape
  shape = jax.ShapeDtypeStruct((B, N, h), jnp.float32)
  grid = {"part": h // COLUMNS, "head": N, "batch": B}
  kernel = hopper.launch_alone("linear_step", _kernel, grid, shape)

  def run(refs):  # not `jax.new_ref`: a ref does not get through the op's custom derivative
    out, state = refs
    out[...] = kernel(inputs._replace(state=state))

  return pl.run_state(run)((jnp.zeros(shape.shape), inputs.state))
