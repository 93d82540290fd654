"""The same questions to every mechanism. A new entry of VARIANTS answers them without a line
here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kit
from attention.variants import VARIANTS, Variant, make_decoder, make_layer, parse, table

ASKED = (*VARIANTS, "softmax:window=9:logit_cap=2.0", "linear:feature_map=relu:normalize=false")
LAYERS = {spec: parse(spec)[0] for spec in ASKED}


def _code(spec):
  """What answers the questions for an entry: its functions, options and kind of inputs."""
  variant = LAYERS[spec].variant
  inputs = jax.eval_shape(
    lambda key: variant.example_inputs(key, 1, 2, 3, 3, 5, 5), jax.random.key(0)
  )
  functions = (variant.attend, variant.reference, variant.init_state, variant.prefill, variant.step)
  return *functions, variant.cost, str(sorted(LAYERS[spec].options.items())), str(inputs)


# Entries that differ only in their mixers are asked once: the first of them answers for all.
SPECS = tuple({_code(spec): spec for spec in reversed(ASKED)}.values())[::-1]
each = pytest.mark.parametrize("spec", SPECS)


def _path(spec):
  """The code that walks over time: a feature map or a scale is nothing to it."""
  *_, options, inputs = _code(spec)
  op = LAYERS[spec].variant.attend.__module__
  return op, inputs, options if op.endswith("softmax") else ""


# What depends on this path alone is asked of the first entry that takes it.
PATHS = tuple({_path(spec): spec for spec in reversed(SPECS)}.values())[::-1]


def _case(spec, **sizes):
  """Shapes that the mechanism takes."""
  case = kit.Case(**sizes)
  return case._replace(h=case.H) if LAYERS[spec].variant.elementwise else case


def _inputs(spec, case, seed=0):
  """(q, k, v, what the mechanism reads besides)."""
  extra = LAYERS[spec].variant.example_inputs(jax.random.key(seed + 9), *case[:2], *case[3:7])
  return *case.inputs(seed), extra


@functools.cache
def _attend(spec, *, oracle=False):
  layer = LAYERS[spec]
  function = layer.variant.reference if oracle else layer.variant.attend
  return jax.jit(functools.partial(function, **layer.options), static_argnames=("is_causal",))


def _slice(tree, index):
  """The same tokens of every array `B T ...`."""
  return jax.tree.map(lambda x: x[:, index], tree)


@pytest.mark.parametrize(
  ("spec", "T"),
  [(spec, T) for spec in SPECS for T in ((1, 200) if spec in PATHS else (150,))],
)
def test_forward_and_gradients_equal_the_reference(spec, T):
  case = _case(spec, T=T, S=T, N=4, K=2, H=8, h=12)
  q, k, v, extra = _inputs(spec, case)
  weights = kit.normal(jax.random.key(3), case.B, T, case.N, case.h)

  def loss(attend, q, k, v, extra):
    out = attend(q, k, v, **extra)
    return (out * weights.astype(out.dtype)).sum(), out

  def run(oracle):
    f = jax.value_and_grad(
      functools.partial(loss, _attend(spec, oracle=oracle)), (0, 1, 2, 3), has_aux=True
    )
    return jax.jit(f)

  (_, out), (dq, dk, dv, d_extra) = run(False)(q, k, v, extra)
  with kit.double():
    (_, *expected), gradients = run(True)(*kit.to_double((q, k, v, extra)))
  kit.assert_close("out", out, expected[0])
  for name, actual, wanted in zip(("dq", "dk", "dv"), (dq, dk, dv), gradients, strict=False):
    kit.assert_close(name, actual, wanted, factor=5, least=0.1)  # one token's dq cancels to 0
  kit.assert_trees_close(d_extra, jax.tree.map(np.asarray, gradients[3]), factor=20, least=0.1)


@each
def test_bfloat16(spec):
  q, k, v, extra = _inputs(spec, kit.Case(T=150, S=150))
  q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
  out = _attend(spec)(q, k, v, **extra)
  assert out.dtype == jnp.bfloat16
  with kit.double():
    expected = _attend(spec, oracle=True)(*kit.to_double((q, k, v)), **kit.to_double(extra))
  kit.assert_close("out", out, expected, "bfloat16")


@each
def test_the_future_changes_nothing_before_it(spec):
  q, k, v, extra = _inputs(spec, kit.Case(T=150, S=150))
  other = _inputs(spec, kit.Case(T=150, S=150), seed=1)
  attend = _attend(spec)
  for t in (1, 64, 131):
    join = lambda a, b, t=t: jnp.concatenate([a[:, :t], b[:, t:] * 3], 1)
    *qkv, changed = jax.tree.map(join, (q, k, v, extra), other)
    kit.assert_same(f"before {t}", attend(*qkv, **changed)[:, :t], attend(q, k, v, **extra)[:, :t])


@each
def test_prefill_and_steps_equal_the_parallel_form(spec):
  """Ragged rows: row 0 is read to 20, row 1 to 11; then both go on, token by token."""
  case = kit.Case(T=40, S=40)
  q, k, v, extra = _inputs(spec, case)
  layer = LAYERS[spec]
  expected = _attend(spec)(q, k, v, **extra)
  state = layer.init_state(
    2,
    num_heads=case.N,
    num_kv_heads=case.K,
    head_dim=case.H,
    value_dim=case.h,
    max_length=40,
    dtype=jnp.float32,
  )
  lengths = np.array([20, 11])
  first = _slice((q, k, v, extra), slice(0, 20))
  state, out = jax.jit(lambda s, q, k, v, n, e: layer.prefill(s, q, k, v, lengths=n, **e))(
    state, *first[:3], jnp.asarray(lengths, jnp.int32), first[3]
  )
  for b in range(2):
    kit.assert_close(f"prefill of row {b}", out[b, : lengths[b]], expected[b, : lengths[b]])
  step = jax.jit(lambda s, q, k, v, e: layer.step(s, q, k, v, **e))
  for i in range(19):
    at = (np.arange(2), lengths + i)
    token = jax.tree.map(lambda x, at=at: x[at], (q, k, v, extra))
    state, out = step(state, *token)
    kit.assert_close(f"step {i}", out, expected[at])


@each
def test_packed_documents_equal_the_documents_alone(spec):
  """At boundaries that no chunk or block is aligned to. Alone, a document comes first: what is
  behind it changes nothing.
  """
  q, k, v, extra = _inputs(spec, kit.Case(T=150, S=150))
  cuts = [0, 3, 67, 128, 149, 150]
  ids = np.zeros((2, 150), np.int32)
  for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
    ids[:, a:b] = i
  attend = _attend(spec)
  packed = attend(q, k, v, segment_ids=jnp.asarray(ids), **extra)
  for a, b in zip(cuts, cuts[1:], strict=False):
    first = jax.tree.map(lambda x, a=a: jnp.roll(x, -a, axis=1), (q, k, v, extra))
    alone = attend(*first[:3], **first[3])
    kit.assert_close(f"document {a}:{b}", packed[:, a:b], alone[:, : b - a])


@each
def test_repeated_and_zero_keys_and_large_values(spec):
  q, k, v, extra = _inputs(spec, kit.Case(T=150, S=150))
  for name, changed in {
    "repeated": (q, jnp.broadcast_to(k[:, :1], k.shape), v),
    "zero": (q, k * 0, v),
    "large values": (q, k, v * 1e6),
    "large queries": (q * 30, k, v),
  }.items():
    out = _attend(spec)(*changed, **extra)
    with kit.double():
      expected = _attend(spec, oracle=True)(*kit.to_double(changed), **kit.to_double(extra))
    kit.assert_close(name, out, expected, factor=5)


@each
def test_not_causal_sees_all(spec):
  q, k, v, extra = _inputs(spec, _case(spec, T=21, S=21, N=16))
  attend = _attend(spec)
  alike = jnp.broadcast_to(k[:, :1], k.shape)  # no key is better: all are read, or some drawn
  changed = attend(q, alike, v.at[:, 16:].add(5.0), is_causal=False, **extra)
  out = attend(q, alike, v, is_causal=False, **extra)
  assert (np.abs(np.asarray(changed - out)).max((0, 2, 3))[12:] > 0).all()
  with kit.double():
    oracle = _attend(spec, oracle=True)(
      *kit.to_double((q, k, v)), is_causal=False, **kit.to_double(extra)
    )
  kit.assert_close("out", attend(q, k, v, is_causal=False, **extra), oracle)


@pytest.mark.parametrize("spec", PATHS)
def test_vmap_and_shard_map_and_two_runs(spec):
  """Heads on two devices and rows on four: equal to one device."""
  q, k, v, extra = _inputs(spec, kit.Case(B=4, T=40, S=40))
  attend = lambda q, k, v, extra: _attend(spec)(q, k, v, **extra)
  out = attend(q, k, v, extra)
  kit.assert_same("again", attend(q, k, v, extra), out)
  mapped = jax.vmap(lambda *x: attend(*jax.tree.map(lambda y: y[None], x))[0])(q, k, v, extra)
  kit.assert_close("vmap", mapped, out)
  mesh = jax.make_mesh((4, 2), ("rows", "heads"))
  where = P("rows", None, "heads")
  sharded = jax.shard_map(
    attend, mesh=mesh, in_specs=(where,) * 4, out_specs=where, check_vma=False
  )
  put = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, where))
  kit.assert_close("shard_map", jax.jit(sharded)(*jax.tree.map(put, (q, k, v, extra))), out)


@each
def test_bad_input_says_why(spec):
  q, k, v, extra = _inputs(spec, kit.Case(T=6, S=6))
  with pytest.raises(ValueError, match="8.*7|7.*8"):
    _attend(spec)(q, k[..., :7], v, **extra)
  with pytest.raises(ValueError, match="4.*3|3.*4"):
    _attend(spec)(q, *(jnp.concatenate([x, x[:, :, :1]], 2) for x in (k, v)), **extra)


@each
def test_cost_is_positive_and_the_state_is_its_size(spec):
  """`cost` says what decoding keeps; the state itself may only add counters."""
  layer, case = LAYERS[spec], kit.Case(T=64, S=64)
  cost = layer.cost(case.B, case.T, case.S, case.N, case.K, case.H, case.h)
  assert cost.flops > 0 and cost.bytes > 0
  state = layer.init_state(
    case.B,
    num_heads=case.N,
    num_kv_heads=case.K,
    head_dim=case.H,
    value_dim=case.h,
    max_length=64,
    dtype=jnp.float32,
  )
  kept = sum(x.nbytes for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))
  assert kept == cost.state_bytes


# Of 3 rows, 5 queries of 4 heads, 7 keys of 2 heads, widths 6 and 10, which are 12 sequences of
# 3 + 4 + 5 + 6 + 7 = 25 pairs: flops, numbers read or written once, numbers kept.
READ, KEPT = 3 * (5 * 4 + 7 * 2) * (6 + 10), 3 * 7 * 2 * (6 + 10)
READ_AS_LONG = 3 * (5 * 4 + 5 * 2) * (6 + 10)  # where there are as many keys as queries
COSTS = {
  "softmax": (12 * 25 * 2 * (6 + 10), READ, KEPT),
  "softmax:window=4": (12 * (3 + 4 * 4) * 2 * (6 + 10), READ, 3 * 4 * 2 * (6 + 10)),
  "hardmax": (12 * (25 * 2 * 6 + 5 * 2 * 10), READ, KEPT),
  "hardmax:top_k=3": (12 * (25 * 2 * 6 + 5 * 3 * 2 * 10), READ, KEPT),
  "stochastic": (12 * 25 * 2 * 6, READ, KEPT),
  # Scores and their values, a chunk being all 5, and a state written and read.
  "retnet": (12 * 5 * 2 * (5 * (6 + 10) + 2 * 6 * 10), READ_AS_LONG, 12 * 6 * 11),
  "linear": (12 * 5 * 2 * (5 * (6 + 11) + 2 * 6 * 11), READ_AS_LONG, 12 * 6 * 11),
  "taylor": (12 * 5 * 2 * (5 * (28 + 11) + 2 * 28 * 11), READ_AS_LONG, 12 * 28 * 11),
  # q, k, v, the decay and the output, all 6 wide; three levels of three, and four.
  "rglru": (12 * 5 * 6 * (3 * 3 + 4), 3 * 5 * (3 * 4 + 2 * 2) * 6, 12 * 6),
}


@pytest.mark.parametrize("spec", COSTS)
def test_cost_by_hand(spec):
  flops, moved, kept = COSTS[spec]
  assert parse(spec)[0].cost(3, 5, 7, 4, 2, 6, 10) == (flops, 4 * moved, 4 * kept)


@pytest.mark.parametrize("spec", ["linear", "rglru"])
def test_beyond_a_chunk_a_recurrence_costs_the_same_a_token(spec):
  flops = [LAYERS[spec].cost(1, T, T, 4, 2, 8, 8).flops for T in (16, 128, 384)]
  assert flops[0] / 16 < flops[1] / 128 == flops[2] / 384


def test_specs_and_their_misspellings():
  layers = parse("linear, softmax:window=128:logit_cap=30.0 ,gated_linear")
  assert [layer.name for layer in layers] == ["linear", "softmax", "gated_linear"]
  assert layers[1].options == {"window": 128, "logit_cap": 30.0}
  assert parse("softmax")[0] == make_layer("softmax")
  for spec, message in {
    "sofmax": "did you mean 'softmax'",
    "softmax:windw=3": "did you mean 'window'",
    "softmax:window": "option=value",
    "softmax:window=a": "window='a' must be a number",
    "linear:normalize=maybe": "must be true or false",
  }.items():
    with pytest.raises(ValueError, match=message):
      parse(spec)


def test_one_entry_answers_for_those_of_the_same_code():
  """What is left out differs in words and mixers alone; a path, in maps and scales too."""
  aside = {"mixer", "rotary", "example_inputs", "summary", "complexity", "source", "options"}
  names = {field.name for field in dataclasses.fields(Variant)} - aside

  def computes(spec):
    return {name: getattr(LAYERS[spec].variant, name) for name in names}, LAYERS[spec].options

  def walks(spec):
    inputs = functools.partial(LAYERS[spec].variant.example_inputs, B=1, T=3, N=2, K=2, H=8, h=8)
    return LAYERS[spec].variant.attend.__module__, jax.eval_shape(inputs, jax.random.key(0))

  for spec in set(ASKED) - set(SPECS):
    same = [other for other in SPECS if computes(other) == computes(spec)]
    assert any(walks(other) == walks(spec) for other in same), spec
  for spec in set(SPECS) - set(PATHS):
    assert any(walks(other) == walks(spec) for other in PATHS), spec
  assert {"softmax", "softmax:window=9:logit_cap=2.0"} < set(PATHS)


def test_table_has_a_row_for_each():
  assert [row.name for row in table()] == list(VARIANTS)
  assert all("](http" in row.source for row in table())


def test_make_decoder_repeats_the_pattern():
  from flax import nnx

  from attention.modules.config import DecoderConfig

  config = DecoderConfig(
    vocab_size=8, num_layers=5, width=16, num_heads=2, pattern="linear,softmax:window=4"
  )
  model = make_decoder(config, rngs=nnx.Rngs(0))
  assert [block.mixer.mechanism.name for block in model.blocks] == ["linear", "softmax"] * 2 + [
    "linear"
  ]
