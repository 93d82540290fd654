"""A whole model: decoding equals the parallel form, meshes change nothing, patterns mix layers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from attention.modules import sharding
from attention.modules.block import dropout
from attention.modules.config import DecoderConfig
from attention.modules.decoder import Decoder
from attention.variants import make_decoder, parse

HYBRID = "linear,gated_linear,softmax:window=5"
PATTERNS = ("softmax", "softmax:window=3", "linear", "gated_linear", HYBRID)
CONFIG = DecoderConfig(
  vocab_size=48, num_layers=1, width=16, num_heads=8, num_kv_heads=4, head_dim=6, mlp_width=32
)


def configure(pattern: str, **changes: Any) -> DecoderConfig:
  layers = 3 if pattern == HYBRID else 1
  taps = 3 if pattern == HYBRID else 0
  config = dataclasses.replace(CONFIG, pattern=pattern, num_layers=layers, short_convolution=taps)
  return dataclasses.replace(config, **changes)


def build(config):
  """(params, graphdef), on the mesh in context."""
  graphdef, params = nnx.split(make_decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
  return params, graphdef


build_once = functools.cache(build)


def tokens_of(B=8, T=16, seed=1):
  return jax.random.randint(jax.random.key(seed), (B, T), 0, CONFIG.vocab_size)


def apply(graphdef, params, tokens, **inputs):
  return nnx.merge(graphdef, params)(tokens, **inputs)


def loss(graphdef, params, tokens, **inputs):
  """(a sum over all logits in which no symmetry hides an error, the logits)."""
  logits = apply(graphdef, params, tokens, **inputs)
  waves = [jnp.sin(1.0 + jnp.arange(n, dtype=jnp.float32)) for n in logits.shape]
  return jnp.einsum("btv,b,t,v->", logits, *waves), logits


@functools.cache
def forward(graphdef):
  return jax.jit(functools.partial(apply, graphdef))


@functools.cache
def gradient(graphdef):
  """(parameters, tokens) -> (gradients, logits)."""
  return jax.jit(jax.grad(functools.partial(loss, graphdef), has_aux=True))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_prefill_and_steps_equal_the_parallel_model(pattern):
  params, graphdef = build_once(configure(pattern))
  tokens = tokens_of()
  full = np.asarray(forward(graphdef)(params, tokens))
  model = lambda params: nnx.merge(graphdef, params)
  prefill = jax.jit(lambda params, *args: model(params).prefill(*args))
  step = jax.jit(lambda params, *args: model(params).step(*args))
  lengths, rows, tokens = np.array([5, 7, 1, 9, 4, 3, 9, 2]), np.arange(8), np.asarray(tokens)
  empty = jax.jit(lambda: model(params).init_state(8, 16))()
  state, logits = prefill(params, empty, tokens[:, :9], lengths)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(np.asarray(logits)[row, :length], full[row, :length], atol=2e-5)
  for i in range(7):
    at = lengths + i
    np.testing.assert_array_equal(state.positions, at)
    state, logits = step(params, state, tokens[rows, at])
    np.testing.assert_allclose(logits, full[rows, at], atol=2e-5)
    np.testing.assert_array_equal(np.argmax(logits, -1), full[rows, at].argmax(-1))


def test_a_prompt_may_come_in_pieces():
  params, graphdef = build_once(configure(HYBRID))
  tokens = tokens_of()

  @jax.jit
  def run(params):
    model = nnx.merge(graphdef, params)
    _, whole = model.prefill(model.init_state(8, 16), tokens)
    state, first = model.prefill(model.init_state(8, 16), tokens[:, :7])
    _, second = model.prefill(state, tokens[:, 7:])
    return whole, jnp.concatenate([first, second], axis=1)

  whole, pieces = run(params)
  np.testing.assert_allclose(pieces, whole, atol=2e-5)


def test_decoding_on_a_mesh():
  config = configure(HYBRID)
  params, graphdef = build_once(config)
  tokens, lengths = tokens_of(), jnp.array([5, 7, 1, 8, 4, 3, 8, 2])

  def decode(params):
    model = nnx.merge(graphdef, params)
    state, _ = model.prefill(model.init_state(8, 16), tokens[:, :8], lengths)

    rows = lambda x: sharding.reshard(x, sharding.spec("batch"))

    def body(carry, _):
      state, logits = model.step(*carry)
      return (state, rows(logits).argmax(-1)), logits

    return jax.lax.scan(body, (state, rows(tokens[:, 0])), length=5)[1]

  want = jax.jit(decode)(params)
  with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"))):
    got = jax.jit(decode)(build(config)[0])
  np.testing.assert_allclose(got, want, atol=2e-5)


EVERY = {"fsdp": 2, "tensor": 2, "sequence": 2}
CASES = [(HYBRID, EVERY), (HYBRID, {"data": 2, "sequence": 4}), ("softmax", EVERY)]


def differences(got, want):
  """By name, the largest difference of each array, as a share of the largest element."""
  share = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())
  return {
    jax.tree_util.keystr(path): share(a, b)
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    )
  }


def assert_same_on_mesh(config, axes):
  """Initial parameters bitwise, logits and gradients within rounding, shardings as declared."""
  params, graphdef = build_once(config)
  tokens = tokens_of()
  gradients, logits = gradient(graphdef)(params, tokens)
  with jax.set_mesh(jax.make_mesh(tuple(axes.values()), tuple(axes))):
    sharded, same_graphdef = build(config)
    got_gradients, got = gradient(graphdef)(sharded, tokens)
  assert same_graphdef == graphdef
  jax.tree.map(np.testing.assert_array_equal, sharded, params)
  np.testing.assert_allclose(got, logits, atol=2e-5)
  # A product that is cut sums in another order: on an AVX2 processor 6e-5 of a gradient.
  worst = {k: v for k, v in differences(got_gradients, gradients).items() if v > 1e-4}
  assert not worst
  where = lambda tree: [jax.typeof(x).sharding.spec for x in jax.tree.leaves(tree)]
  assert where(got_gradients) == where(sharded)
  return sharded


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "axes"), CASES, ids=str)
def test_a_mesh_changes_nothing(pattern, axes):
  params = assert_same_on_mesh(configure(pattern), axes)
  cut = lambda axis: axis if axis in axes else None
  mixer = params["blocks"][0]["mixer"]
  assert jax.typeof(params["embedding"][...]).sharding.spec == P(cut("tensor"), cut("fsdp"))
  kernel = jax.typeof(mixer["query"]["kernel"][...])
  assert kernel.sharding.spec == P(cut("fsdp"), cut("tensor"), None)


@pytest.mark.slow
def test_a_mesh_changes_nothing_for_mixers_that_learn_more():
  """What is per head lies with its head, and a norm over all heads crosses devices."""
  pattern = "retnet,lightning,mamba2,hgrn2,rglru,hedgehog,performer"
  config = configure(pattern, num_layers=7)
  params, graphdef = build_once(config)
  tokens = tokens_of()
  want = forward(graphdef)(params, tokens)
  with jax.set_mesh(jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "sequence"))):
    sharded, same_graphdef = build(config)
    got = forward(same_graphdef)(sharded, tokens)
  jax.tree.map(np.testing.assert_array_equal, sharded, params)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_mesh_changes_nothing_for_one_key_head_and_an_untied_head():
  config = configure("softmax", num_kv_heads=1, tie_embeddings=False, remat="dots")
  assert_same_on_mesh(config, {"data": 2, "fsdp": 4})


@pytest.mark.parametrize(
  ("changes", "shape", "sentence"),
  [
    (
      {"num_kv_heads": 2},
      (8, 16),
      r"num_kv_heads=2 is not divisible by 4, .*tensor=2 \* sequence=2",
    ),
    ({"vocab_size": 47}, (8, 16), "vocab_size=47 is not divisible by 2, the mesh's tensor=2"),
    ({"width": 15}, (8, 16), "width=15 is not divisible by 2, the mesh's fsdp=2"),
    ({"mlp_width": 31}, (8, 16), "mlp_width=31 is not divisible by 2, the mesh's tensor=2"),
    ({}, (3, 16), "the batch size=3 is not divisible by 2, the mesh's fsdp=2"),
    ({}, (8, 15), "the sequence length=15 is not divisible by 2, the mesh's sequence=2"),
  ],
)
def test_what_a_mesh_cannot_cut(changes, shape, sentence):
  config = dataclasses.replace(CONFIG, num_layers=1, **changes)
  tokens = jnp.zeros(shape, jnp.int32)
  make = lambda: make_decoder(config, rngs=nnx.Rngs(0))(tokens)
  with (
    jax.set_mesh(jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "sequence"))),
    pytest.raises(ValueError, match=sentence),
  ):
    jax.eval_shape(make)


def test_packed_documents_equal_documents_alone():
  params, graphdef = build_once(configure(HYBRID))
  run, tokens = forward(graphdef), tokens_of()
  packed = run(params, tokens, segment_ids=jnp.array([[0] * 6 + [1] * 10] * 8))
  first = run(params, tokens.at[:, 6:].set(0))[:, :6]
  second = run(params, jnp.roll(tokens, -6, axis=1))[:, :10]
  np.testing.assert_allclose(packed, jnp.concatenate([first, second], axis=1), atol=2e-5)


def test_the_future_does_not_leak():
  params, graphdef = build_once(configure(HYBRID))
  run = forward(graphdef)
  tokens = tokens_of()
  changed = tokens.at[:, 9:].set((tokens[:, 9:] + 1) % CONFIG.vocab_size)
  before, after = run(params, tokens), run(params, changed)
  np.testing.assert_array_equal(before[:, :9], after[:, :9])
  assert (before[:, 9:] != after[:, 9:]).any(-1).all()


def test_tree_mode_gives_the_same():
  config = configure(HYBRID)
  params, graphdef = build_once(config)
  tokens = tokens_of()
  want = forward(graphdef)(params, tokens)
  with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
    again, structure = build(config)
    got = forward(structure)(again, tokens)
  np.testing.assert_array_equal(got, want)


def test_the_structure_is_static():
  """One graphdef for one configuration: hashable, so that it can be a static argument of jit."""
  config = configure(HYBRID)
  other = dataclasses.replace(config, pattern=HYBRID.replace("window=5", "window=6"))
  first, second, third = (
    nnx.split(nnx.eval_shape(lambda c=c: make_decoder(c, rngs=nnx.Rngs(0))))[0]
    for c in (config, config, other)
  )
  assert first == second
  assert hash(first) == hash(second)
  assert first != third


def test_the_pattern_repeats_over_the_depth():
  config = dataclasses.replace(CONFIG, num_layers=5)
  make = lambda: Decoder(config, parse("linear,softmax:window=4"), rngs=nnx.Rngs(0))
  model = nnx.eval_shape(make)
  names = [block.mixer.mechanism.name for block in model.blocks]
  assert names == ["linear", "softmax", "linear", "softmax", "linear"]
  assert model.blocks[3].mixer.mechanism.options["window"] == 4
  state = jax.eval_shape(lambda: make().init_state(2, 100))
  assert state.layers[1].mechanism.key.shape == (2, 4, 4, 6)  # a ring of four tokens


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_and_not_the_gradient(remat):
  tokens = tokens_of()
  params, graphdef = build_once(configure("linear"))
  again, rematted = build_once(configure("linear", remat=remat))
  want = gradient(graphdef)(params, tokens)[0]
  got = gradient(rematted)(again, tokens)[0]
  worst = {k: v for k, v in differences(got, want).items() if v > 2e-5}
  assert not worst

  def kept(graphdef):
    vjp = lambda params: jax.vjp(functools.partial(apply, graphdef, tokens=tokens), params)[1]
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(vjp, params)))

  assert kept(rematted) < kept(graphdef)


@pytest.mark.parametrize("pattern", ["linear,linear,softmax:window=5", HYBRID])
def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(pattern):
  tokens = tokens_of()
  three = {"num_layers": 3, "short_convolution": 3}
  params, graphdef = build_once(configure(pattern, **three))
  half_params, half = build_once(configure(pattern, dtype="bfloat16", **three))
  assert {x.dtype for x in jax.tree.leaves(half_params)} == {jnp.dtype("float32")}
  want = forward(graphdef)(params, tokens)
  got = forward(half)(half_params, tokens)
  assert got.dtype == jnp.float32
  error = np.abs(np.asarray(got - want)) / float(jnp.abs(want).max())
  assert error.max() > 0
  if pattern == HYBRID:
    # Where a head reads next to nothing, its norm amplifies what rounding left of its keys.
    assert np.quantile(error, 0.999) < 0.05 and error.max() < 0.1
  else:
    assert error.max() < 0.05
  gradients = gradient(half)(half_params, tokens)[0]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_dropout_needs_a_key():
  tokens = tokens_of()
  params, graphdef = build_once(configure("softmax", dropout=0.3))
  run = forward(graphdef)
  plain = run(params, tokens)
  np.testing.assert_array_equal(plain, run(params, tokens))
  first, again, other = (
    run(params, tokens, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  assert (first != plain).any()


def test_the_embedding_and_every_layer_drop_on_their_own():
  """Where each of four drops half of what the one before has left, a sixteenth is left."""

  class Dropping(nnx.Module):
    def __call__(self, x, *, dropout_key, **inputs):
      return dropout(x, 0.5, dropout_key)

  params, graphdef = build_once(configure("softmax", dropout=0.5))
  model = nnx.merge(graphdef, params)
  model.blocks = nnx.List([Dropping() for _ in range(3)])
  model._logits = lambda x: x
  left = np.asarray(model(tokens_of(), dropout_key=jax.random.key(0)) != 0)
  assert abs(left.mean() - 2**-4) < 0.02


def test_a_new_model_knows_nothing():
  """The first loss is that of guessing evenly: the scale of the initial logits is small."""
  params, graphdef = build_once(configure(HYBRID))
  logits = forward(graphdef)(params, tokens_of())
  entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1)
  assert float(entropy.mean()) > 0.98 * np.log(CONFIG.vocab_size)
