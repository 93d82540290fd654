"""What `linear_kernels` lowers for a kernel and puts together after it. The kernel here is the
recurrence as it stands: a real one has its own tests.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

import kit
import linear_kit
from attention import chips, explain, linear_attention, linear_kernels
from attention.ops import linear
from pallas_kernels import linear_hopper
from pallas_kernels.linear import State

B, T, N, K, H, h = 2, 21, 4, 2, 6, 5


def _plain(q, k, v, g, state, settings):
  """(unnormalized output or weight of each token, ...): what a kernel's derivative is made of."""
  numerator, after = linear_kit.recurrence(
    q, k, v, g, state._replace(z=None), settings._replace(normalize=False, scale=1.0)
  )
  if not settings.normalize:
    return numerator * settings.scale, None, after
  ones = jnp.ones((*v.shape[:3], 1), v.dtype)
  weight, z = linear_kit.recurrence(
    q, k, ones, g, State(state.z[..., None], None), settings._replace(normalize=False, scale=1.0)
  )
  return numerator, weight[..., 0].swapaxes(1, 2), State(after.kv, z.kv[..., 0])


def forward(q, k, v, g, state, settings):
  """A kernel's."""
  out, weight, after = _plain(q, k, v, g, state, settings)
  if weight is not None:
    weights = weight.swapaxes(1, 2)[..., None]
    out = jnp.where(weights == 0, 0, out / jnp.where(weights == 0, 1, weights))
  return out, weight, after


def backward(q, k, v, g, state, normalized, d_out, d_state, settings):
  """A kernel's: through the unnormalized output and the weight, as `Normalized` says."""
  _, pull = jax.vjp(functools.partial(_plain, settings=settings), q, k, v, g, state)
  d_weight = None
  if normalized is not None:
    d_out = d_out * normalized.inverse.swapaxes(1, 2)[..., None]
    d_weight = -normalized.inverse * normalized.delta
  return pull((d_out, d_weight, d_state))


@pytest.fixture(params=("hopper", "tpu"))
def chip(request, monkeypatch):
  """A chip that is pretended to be here; the first wants time in three parts."""
  here = {"hopper": chips.Chip("gpu", "NVIDIA H200"), "tpu": chips.Chip("tpu", "TPU v5 lite")}
  monkeypatch.setattr(chips, "current", lambda: here[request.param])
  refuse = lambda q, k, v, g, settings: "widths over 8" if q.shape[3] > 8 else None
  parts = lambda states, T, h: 3 if request.param == "hopper" and T % 3 == 0 else 1
  kernel = types.SimpleNamespace(
    forward=forward, backward=backward, unsupported=refuse, parts=parts
  )
  monkeypatch.setattr(linear_kernels, "_kernel", lambda chip: kernel)
  return request.param


def tokens():
  """q, k, v, a decay per token, a state."""
  make = kit.keys(0)
  normal = lambda *shape: kit.normal(next(make), *shape)
  q, k, v = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, h)
  state = linear.State(normal(B, N, H, h), jnp.abs(normal(B, N, H)))
  return q, k, v, -jnp.abs(normal(B, T, N)), state


IDS = jnp.asarray([[0] * 5 + [1] * 9 + [0] * 7, [4] * 13 + [2] * 8], jnp.int32)
WAYS = {
  "plain": {},
  "normalized": {"feature_map": "elu_plus_one", "normalize": True},
  "documents": {"segment_ids": IDS},
  "documents backward": {"segment_ids": IDS, "reverse": True, "normalize": True},
  "padding": {"lengths": jnp.asarray([14, 21], jnp.int32), "segment_ids": IDS},
  "both directions": {"bidirectional": True, "segment_ids": IDS, "normalize": True},
  "scaled": {"scale": 0.3, "reverse": True},
}


IN_PARTS = [("documents", "head"), ("documents backward", "token"), ("normalized", "channel"),
            ("both directions", "none"), ("padding", "token")]  # fmt: skip


@pytest.mark.parametrize(
  ("chip", "way", "decay"),
  [
    *(("tpu", way, "token") for way in WAYS),
    *(("tpu", "documents", decay) for decay in ("none", "head")),
    *(("hopper", *one) for one in IN_PARTS),
  ],
  indirect=["chip"],
)
def test_every_result_by_name(chip, way, decay):
  """Output, state and gradients of every direction, padding and document, with harsh decays."""
  kit.assert_trees_close(
    _results(chip, way, decay),
    _results("chunked", way, decay),
    factor=4,  # two float32 results beside each other, both ways by subtraction of a token's own
  )


@functools.cache
def _results(implementation, way, decay):
  options = dict(WAYS[way])
  q, k, v, g, state = tokens()
  g = g.at[:, 3].set(-1e4).at[:, 4].set(0.0)
  channels = jnp.stack([c * g for c in range(H)], -1)
  g = {"none": None, "head": -jnp.arange(1.0 * N), "token": g, "channel": channels}[decay]
  if options.get("normalize"):
    q, k = jnp.abs(q), jnp.abs(k)
  stateful = not options.get("bidirectional")
  inputs = {"q": q, "k": k, "v": v} | ({"log_decay": g} if g is not None else {})
  inputs |= {"initial_state": state} if stateful else {}

  def loss(inputs):
    found = linear_attention(
      **inputs, **options, return_state=stateful, implementation=implementation
    )
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(found)), found

  (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
  return found, gradients


def test_a_second_derivative_and_a_wide_head_are_refused(chip):
  q, k, v, g, _ = tokens()
  f = lambda q: linear_attention(q, k, v, log_decay=g, implementation=chip).sum()
  with pytest.raises(NotImplementedError, match=f"{chip!r} kernel is differentiable once"):
    jax.grad(lambda q: jax.grad(f)(q).sum())(q)
  wide = jnp.zeros((B, T, N, 9))
  with pytest.raises(NotImplementedError, match="widths over 8"):
    linear_attention(wide, wide, wide, implementation=chip)
  assert "runs 'chunked'" in explain(linear_attention, wide, wide, wide)


def test_the_best_there_is_runs(chip):
  q, k, v, _, _ = tokens()
  assert f"runs {chip!r}" in explain(linear_attention, q, k, v)


def test_a_map_runs_once_for_each_element(chip):
  q, k, v, g = (x[:, :20] for x in tokens()[:4])  # too few for parts of time, which XLA adds up
  f = functools.partial(linear_attention, implementation=chip)
  many = jax.vmap(lambda q, g: f(q, k, v, log_decay=g))(jnp.stack([q, 2 * q]), jnp.stack([g, g]))
  kit.assert_same("mapped", many[1], f(2 * q, k, v, log_decay=g))


def test_no_cpu_kernel():
  q, k, v, _, _ = tokens()
  for name in ("hopper", "tpu"):
    with pytest.raises(NotImplementedError, match="this is cpu"):
      linear_attention(q, k, v, implementation=name)


REAL = {
  "hopper": (
    chips.Chip("gpu", "NVIDIA H200"),
    lambda: plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
  ),
  "tpu": (
    chips.Chip("tpu", "TPU v5 lite"),
    lambda: pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)),
  ),
}


@pytest.mark.parametrize("name", REAL)
def test_the_chips_own_kernels_run_in_the_op(name, monkeypatch):
  """Documents, padding and decays per channel, and then a token; against the recurrence."""
  here, interpreter = REAL[name]
  monkeypatch.setattr(chips, "current", lambda: here)
  for function in ("forward", "backward"):
    run = functools.partial(getattr(linear_hopper, function), on_chip=False)
    monkeypatch.setattr(linear_hopper, function, run)
  dtype = "bfloat16" if name == "hopper" else "float32"
  make = kit.keys(3)
  q, k, v = (jax.random.normal(next(make), (1, 70, heads, 32)).astype(dtype) for heads in (2, 1, 2))
  g = -jnp.exp(2 * jax.random.normal(next(make), (1, 70, 2, 32)) - 3)
  ids, lengths = jnp.arange(70)[None] // 23, jnp.array([67])

  def loss(implementation, q, k, v, g):
    out, state = linear_attention(
      q, k, v, log_decay=g, segment_ids=ids, lengths=lengths, return_state=True,
      implementation=implementation,
    )  # fmt: skip
    back = [jnp.sin(jnp.arange(x.size)).reshape(x.shape).astype(g.dtype) for x in (out, state.kv)]
    return jnp.vdot(back[0], out.astype(g.dtype)) + jnp.vdot(back[1], state.kv), (out, state.kv)

  def results(implementation, *given):
    run = jax.value_and_grad(functools.partial(loss, implementation), (0, 1, 2, 3), has_aux=True)
    (_, found), gradients = jax.jit(run)(*given)
    return found, gradients

  with kit.double():
    want = jax.tree.map(np.asarray, results("reference", *kit.to_double((q, k, v, g))))
  with interpreter():
    kit.assert_trees_close(results(name, q, k, v, g), want, dtype, factor=2)  # g: sums that cancel

    state = linear.init_state(
      1, num_heads=2, num_kv_heads=1, head_dim=32, value_dim=32, max_length=1
    )._replace(kv=jax.random.normal(next(make), (1, 2, 32, 32)))
    token = [x[:, 0] for x in (q, k, v)]
    stepped = linear.step(state, *token, log_decay=g[:, 0], implementation=name)
  expected = linear.step(state, *token, log_decay=g[:, 0])
  kit.assert_trees_close(stepped, expected, dtype)
