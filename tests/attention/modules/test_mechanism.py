"""What a mechanism receives on one device: positions, convolved tokens, and its own state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention.modules import mechanism
from attention.modules.convolution import causal_convolution
from attention.positions import rotary


@dataclasses.dataclass(frozen=True)
class Recorder:
  """Gives back the queries and keys that it was given, and adds up values in its state."""

  rotary: bool = False
  mixer: type = object

  def init_state(self, batch, **sizes):
    raise AssertionError(f"not asked for: {batch}, {sizes}")

  def attend(self, q, k, v, *, segment_ids=None, **inputs):
    out = jnp.concatenate([q, k], axis=-2)
    return out * inputs["gain"] if inputs else out

  def prefill(self, state, q, k, v, *, lengths, **inputs):
    keep = jnp.arange(v.shape[1])[None] < lengths[:, None]
    return state + jnp.where(keep[..., None, None], v, 0.0).sum(1), self.attend(q, k, v, **inputs)

  def step(self, state, q, k, v, **inputs):
    return state + v, self.attend(q, k, v, **inputs)


def draw(T=6):
  keys = jax.random.split(jax.random.key(0), 6)
  q, k, v = (kit.normal(key, 2, T, 2, 4) for key in keys[:3])
  return q, k, v, tuple(kit.normal(key, 2, 3, 4) for key in keys[3:])


@pytest.mark.parametrize("turned", [False, True])
def test_rotary_is_the_mechanisms_choice(turned):
  q, k, v, _ = draw()
  out = mechanism.attend(Recorder(turned), q, k, v, {}, (), None, None)
  positions = jnp.arange(6)[None]
  want = [rotary(x, positions) if turned else x for x in (q, k)]
  np.testing.assert_array_equal(out, jnp.concatenate(want, axis=2))
  moved = mechanism.attend(Recorder(turned), q, k, v, {}, (), None, positions.repeat(2, 0) + 5)
  assert bool((moved == out).all()) != turned


@pytest.mark.parametrize("gain", [None, 3.0])
def test_prefill_and_steps_see_what_attend_sees(gain):
  """Convolutions reach back over the seam, positions go on from the row's end, inputs arrive."""
  q, k, v, weights = draw()
  whole = lambda x: {} if gain is None else {"gain": jnp.full((*x, 1, 1), gain)}
  turning: mechanism.Mechanism = Recorder(True)
  full = mechanism.attend(turning, q, k, v, whole((2, 6)), weights, None, None)
  lengths = jnp.array([3, 1])
  state = mechanism.State(jnp.zeros((2, 2, 4)), (jnp.zeros((2, 2, 2, 4)),) * 3)
  positions = jnp.arange(4)[None].repeat(2, 0)
  prompt = q[:, :4], k[:, :4], v[:, :4]
  state, out = mechanism.prefill(
    turning, state, *prompt, whole((2, 4)), weights, positions, lengths
  )
  for row, length in enumerate((3, 1)):
    np.testing.assert_allclose(out[row, :length], full[row, :length], atol=1e-6)
  rows = jnp.arange(2)
  for i in range(3):
    at = lengths + i
    now = q[rows, at], k[rows, at], v[rows, at]
    state, out = mechanism.step(turning, state, *now, whole((2,)), weights, at)
    np.testing.assert_allclose(out, full[rows, at], atol=1e-6)
  values = causal_convolution(v, weights[2])
  want = [values[row, : length + 3].sum(0) for row, length in enumerate((3, 1))]
  np.testing.assert_allclose(state.mechanism, jnp.stack(want), atol=1e-5)
