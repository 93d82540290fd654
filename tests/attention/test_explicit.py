"""Ops under a mesh whose axes are explicit, beside the same ops on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import attention
import kit
from attention.variants import VARIANTS, make_layer

B, T, N, H = 2, 40, 4, 2
CAUSAL = attention.causal()

CALLS = {
  "softmax": lambda q, k, v: attention.dot_product_attention(q, k, v, is_causal=True),
  "tiled": functools.partial(
    attention.dot_product_attention, mask=CAUSAL, return_residual=True, implementation="tiled"
  ),
  "reference": functools.partial(attention.dot_product_attention, implementation="reference"),
  "linear": functools.partial(attention.linear_attention, return_state=True, chunk_size=16),
  "elu+1": functools.partial(
    attention.linear_attention, feature_map="elu_plus_one", normalize=True, chunk_size=16
  ),
  "hardmax": functools.partial(attention.hardmax_attention, is_causal=True, return_residual=True),
  "bulk": functools.partial(
    attention.hardmax_attention, is_causal=True, return_residual=True, implementation="bulk"
  ),
  "straight through": functools.partial(attention.hardmax_attention, straight_through=0.5),
  "top k": functools.partial(attention.top_k_attention, mask=CAUSAL, top_k=3),
  "fenwick": attention.fenwick_attention,
  "grid": lambda q, k, v: attention.direction_grid_attention(
    *(jnp.pad(x, [(0, 0)] * 3 + [(0, 1)], constant_values=0.5) for x in (q, k)), v, cells=2
  ),
  "stochastic": lambda q, k, v: attention.stochastic_attention(
    q, k, v, noise=jnp.full((B, T, N), 0.3), temperature=1.0, return_draws=True
  ),
}
SENT = re.compile("all-gather|all-to-all|collective-permute")
CUTS = {"batch": P("x"), "heads": P(None, None, "x")}


def inputs() -> list[jax.Array]:
  make = kit.keys()
  return [kit.normal(next(make), B, T, N, H) for _ in range(3)]


def place(tree, spec):
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
  assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
  return jax.device_put(tree, NamedSharding(mesh, spec))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", CALLS)
def test_it_gives_what_one_device_gives_and_is_cut_as_the_queries_are(name, cut):
  call = jax.jit(CALLS[name])
  qkv = inputs()
  placed = place(qkv, CUTS[cut])
  program = call.lower(*placed).compile()
  want, got = call(*qkv), program(*placed)
  kit.assert_trees_close(jax.device_get(got), want)
  assert not SENT.findall(program.as_text()), "a device asked another for what it holds"
  axis = {"batch": 0, "heads": 2}[cut]
  out = jax.tree.leaves(got)[0]
  assert jax.typeof(out).sharding.spec[axis] == "x", jax.typeof(out)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["tiled", "linear", "straight through"])
def test_its_gradients_are_those_of_one_device(name, cut):
  def loss(*qkv):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(CALLS[name](*qkv)) if x.dtype == "f4")

  grad, qkv = jax.jit(jax.grad(loss, (0, 1, 2))), inputs()
  want, got = grad(*qkv), grad(*place(qkv, CUTS[cut]))
  for who, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
    kit.assert_close(f"{who} of {name}, {cut}", jax.device_get(a), b)
    assert jax.typeof(a).sharding.spec[:3] == (*CUTS[cut], None, None, None)[:3]


def test_masks_documents_and_few_key_heads():
  """Segment ids cut as the batch is, a bias that is whole, one key head of four queries."""
  (q, k, v), ids = inputs(), jnp.arange(T)[None] // jnp.array([[7], [11]])
  bias = kit.normal(jax.random.key(9), 1, N, T, T)

  @jax.jit
  def call(q, k, v, ids, bias):
    k, v = k[:, :, :1], v[:, :, :1]
    mask = attention.causal() & attention.segments(ids)
    return (
      attention.dot_product_attention(q, k, v, bias, mask, implementation="tiled"),
      attention.linear_attention(q, k, v, segment_ids=ids, chunk_size=16),
    )

  want = call(q, k, v, ids, bias)
  batch, whole = place([q, k, v, ids], CUTS["batch"]), place(bias, P())
  kit.assert_trees_close(jax.device_get(call(*batch, whole)), want)
  heads = place(q, CUTS["heads"]), *place([k, v, ids, bias], P())
  kit.assert_trees_close(jax.device_get(call(*heads)), want)


def test_other_forms_of_the_first_argument():
  """No batch, and channels in place of heads."""
  q, k, v = (x[0] for x in inputs())
  call = jax.jit(functools.partial(attention.dot_product_attention, implementation="tiled"))
  got = call(*place([q, k, v], P(None, "x")))
  kit.assert_close("unbatched", jax.device_get(got), call(q, k, v))
  assert jax.typeof(got).sharding.spec == P(None, "x", None)
  b, log_a = kit.normal(jax.random.key(0), B, T, 6), -jnp.ones((B, T, 6))
  scan = jax.jit(functools.partial(attention.linear_scan, return_state=True))
  got = scan(*place([b, log_a], P(None, None, "x")))
  kit.assert_trees_close(jax.device_get(got), scan(b, log_a))
  assert [jax.typeof(x).sharding.spec[-1] for x in got] == ["x", "x"]


def test_tokens_may_not_be_cut():
  q, k, v = inputs()
  k = place(k, P(None, "x"))
  with pytest.raises(NotImplementedError, match=r"'x' cuts those of key \[2, 40, 4, 2\]"):
    jax.jit(attention.dot_product_attention)(q, k, v)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_mechanism_runs(name):
  """By its Variant, with what else it reads cut or whole."""
  layer, (q, k, v) = make_layer(name), inputs()
  extra = layer.variant.example_inputs(jax.random.key(1), B, T, N, N, H, H)
  attend = jax.jit(lambda q, k, v, extra: layer.attend(q, k, v, **extra))
  want = attend(q, k, v, extra)
  got = attend(*place([q, k, v], CUTS["heads"]), place(extra, P()))
  kit.assert_close(name, jax.device_get(got), want)
  assert jax.typeof(got).sharding.spec[2] == "x"


def test_the_softmax_mass_of_an_index():
  q, k, v = inputs()
  _, index = attention.fenwick_attention(q, k, v)
  mass = jax.jit(attention.softmax_mass)
  got = mass(*place([q, k, index], CUTS["heads"]))
  kit.assert_close("mass", jax.device_get(got), mass(q, k, index))
  assert jax.typeof(got).sharding.spec == P(None, None, "x")
