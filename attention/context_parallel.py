"""Linear attention over a sequence that lies in parts on several devices.

    S after device d  =  A_d S before it + S_d
    A_d = exp(sum of g)       S_d = sum_j exp(sum of g after j) k_j v_j^T

Device d makes the pair (A_d, S_d) of its own tokens from a state of zeros, with one product and
without a walk; the pairs of all devices are gathered and combined in order, in float32; and each
device then runs its tokens from the state that enters there, by whatever implementation. What is
sent does not grow with T: one state per device and head. Everything is plain JAX around that run,
so that gradients flow between devices as states do.

The idea is sequence parallelism for linear attention (LASP-2, Sun et al. 2025,
https://arxiv.org/abs/2502.07563), here for any decay, with documents and states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention import chunk_scan
from attention.chunk_scan import State


class TimeAxis(NamedTuple):
  """The axis of a mesh that cuts time."""

  name: str
  reverse: bool = False
  """Whether the last device's tokens come first."""


def follow(ids: Int[Array, "B T"], axis: TimeAxis) -> Bool[Array, " B"]:
  """Whether this device's first token goes on with the document of the token before it, which lies
  on another device; so does the very first token, with what came before everything.
  """
  size, me = lax.axis_size(axis.name), lax.axis_index(axis.name)
  step = -1 if axis.reverse else 1
  pairs = [(d, (d + step) % size) for d in range(size)]  # a ring: under vmap it has to be whole
  before = lax.ppermute(ids[:, -1], axis.name, pairs)
  first = me == (size - 1 if axis.reverse else 0)
  return (before == ids[:, 0]) | first


def shared[T](tree: T, axis: TimeAxis) -> T:
  """Arrays that are the same on every device, as JAX knows them to be: `out_specs` may say so."""
  first = lax.axis_index(axis.name) == 0
  return jax.tree.map(lambda x: lax.psum(jnp.where(first, x, 0), axis.name), tree)


def states(
  k: Float[Array, "B T K M"],
  v: Float[Array, "B T K h"],
  g: Float[Array, "B T N W"] | None,
  ids: Int[Array, "B T"] | None,
  initial: State,
  axis: TimeAxis,
) -> tuple[State, State]:
  """(the state that enters this device's tokens, the state after all devices' tokens).

  Args:
    k, v: features of the keys, and values, in the dtype of sums.
    g: log decay, W = 1 or M; None is no decay.
    ids: of documents; None is one.
    initial: the state before everything, the same on every device.
    axis: what cuts time.
  """
  (B, T), N = k.shape[:2], initial.kv.shape[1]
  fade, whole = jnp.zeros((B, T, 1, 1), k.dtype), jnp.ones((B, 1, 1), k.dtype)
  if g is not None:
    following = jnp.pad(g[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)])
    fade = lax.cumsum(following, axis=1, reverse=True)
    whole = jnp.exp(fade[:, 0] + g[:, 0])
  fade = jnp.exp(fade)
  goes_on = None
  if ids is not None:
    runs = chunk_scan.number_runs(ids)
    fade = jnp.where((runs == runs[:, -1:])[..., None, None], fade, 0)
    goes_on = follow(ids, axis)[:, None, None]
    whole = jnp.where(goes_on & (runs[:, -1] == 0)[:, None, None], whole, 0)
  k, v = (chunk_scan.spread(x, N, 2) for x in (k, v))
  k = k * fade
  made = State(
    jnp.einsum("btnm,btnh->bnmh", k, v, precision=lax.Precision.HIGHEST), jnp.sum(k, axis=1)
  )
  gathered = lax.all_gather((whole, made), axis.name)
  if axis.reverse:
    gathered = jax.tree.map(lambda x: jnp.flip(x, axis=0), gathered)

  def after(state: State, part):
    whole, made = part
    new = State(state.kv * whole[..., None] + made.kv, state.z * whole + made.z)
    return new, state

  final, entering = lax.scan(after, initial, gathered)
  me = lax.axis_index(axis.name)
  me = lax.axis_size(axis.name) - 1 - me if axis.reverse else me
  entering = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, me, keepdims=False), entering)
  if goes_on is not None:
    entering = State(
      jnp.where(goes_on[..., None], entering.kv, 0), jnp.where(goes_on, entering.z, 0)
    )
  return entering, final
