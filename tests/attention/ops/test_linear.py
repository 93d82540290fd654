"""Linear attention against the recurrence in float64, one question per test."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kit
from attention import feature_maps
from attention.ops import linear
from attention.ops.linear import State

# Both return an array or a pair, as they are asked; and some tests call them wrongly.
linear_attention: Any = kit.compiled(linear.linear_attention)
reference: Any = kit.compiled(linear.reference)

B, N, K, H, h = 2, 4, 2, 8, 5
DECAYS = ("none", "head", "token", "channel")


def normal(key, *shape):
  return kit.normal(key, *shape)


def tokens(T, seed=0):
  make = kit.keys(seed)
  return (
    normal(next(make), B, T, N, H),
    normal(next(make), B, T, K, H),
    normal(next(make), B, T, K, h),
  )


def decay(kind, T, seed=1) -> Any:
  """None, or minus the exponential of a wide normal: from about -10 to about -0.01."""
  shape = {"head": (N,), "token": (B, T, N), "channel": (B, T, N, H)}.get(kind)
  return (
    None
    if shape is None
    else jax.device_put(-np.exp(2 * np.asarray(normal(jax.random.key(seed), *shape)) - 2))
  )


def some_state(seed=2):
  make = kit.keys(seed)
  return State(normal(next(make), B, N, H, h), jnp.abs(normal(next(make), B, N, H)))


def documents(T, seed=3):
  """Segment ids with about six boundaries, nowhere aligned."""
  starts = np.random.default_rng(seed).random((B, T)) < 6 / T
  return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def recurrence_in_numpy(q, k, v, g, *, ids=None, state=None, normalize=False):
  """The three lines at the top of ops/linear.py, in NumPy: (out, kv, z)."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  T = q.shape[1]
  g = np.zeros(N) if g is None else np.asarray(g, np.float64)
  g = g[None, None, :, None] if g.ndim == 1 else g[..., None] if g.ndim == 3 else g
  g = np.broadcast_to(g, (B, T, N, q.shape[3]))
  kv = np.zeros((B, N, q.shape[3], h)) if state is None else np.asarray(state.kv, np.float64)
  z = np.zeros((B, N, q.shape[3])) if state is None else np.asarray(state.z, np.float64)
  out = np.zeros((B, T, N, h))
  for t in range(T):
    same = np.ones((B, 1, 1)) if ids is None or t == 0 else (ids[:, t] == ids[:, t - 1])
    same = np.reshape(same, (B, 1, 1)).astype(np.float64)
    kv = (same * np.exp(g[:, t]))[..., None] * kv + k[:, t][..., None] * v[:, t][..., None, :]
    z = same * np.exp(g[:, t]) * z + k[:, t]
    out[:, t] = np.einsum("bnm,bnmh->bnh", q[:, t], kv)
    if normalize:
      out[:, t] /= np.einsum("bnm,bnm->bn", q[:, t], z)[..., None]
  return out, kv, z


@functools.partial(jax.jit, static_argnames=("f", "settings"))
def value_and_gradients(f, inputs, weights, extra, settings):
  """(output, state) of f, and the gradient of their weighted sum to every input."""

  def loss(inputs):
    q, k, v, g, state = inputs
    options = dict(settings) | extra
    out = f(q, k, v, log_decay=g, initial_state=state, return_state=True, **options)
    if not options.get("normalize"):
      out = (out[0], out[1]._replace(z=jnp.zeros_like(out[1].z)))
    return sum(jnp.sum(x * w) for x, w in zip(jax.tree.leaves(out), weights, strict=True)), out

  (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
  return {
    "out": out,
    "gradient": dict(zip(("q", "k", "v", "log_decay", "state"), gradients, strict=True)),
  }


def check(inputs, extra=None, *, factor=1.0, chunk_size=32, **settings):
  """Value and gradients, through output and final state, against the recurrence in float64."""
  T = inputs[0].shape[1]
  make, extra = kit.keys(9), extra or {}
  M = inputs[4].z.shape[-1]
  weights = [normal(next(make), *s) for s in ((B, T, N, h), (B, N, M, h), (B, N, M))]
  run = functools.partial(value_and_gradients, extra=extra)
  got = run(
    linear_attention,
    inputs,
    weights,
    settings=tuple({**settings, "chunk_size": chunk_size}.items()),
  )
  with kit.double():
    arrays = kit.to_double((inputs, weights))
    want = run(reference, *arrays, settings=tuple(settings.items()))
  kit.assert_trees_close(got, want, factor=factor)
  return got


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_reference_is_the_recurrence_of_the_papers(kind, normalize):
  q, k, v = tokens(23)
  if normalize:
    q, k = jnp.abs(q), jnp.abs(k)
  g, ids, state = decay(kind, 23), documents(23), some_state()
  out, kv, z = recurrence_in_numpy(
    q, k, v, g, ids=np.asarray(ids), state=state, normalize=normalize
  )
  got, end = reference(
    q, k, v, log_decay=g, segment_ids=ids, initial_state=state, normalize=normalize,
    return_state=True,
  )  # fmt: skip
  kit.assert_close("out", got, out)
  kit.assert_close("kv", end.kv, kv)
  if normalize:
    kit.assert_close("z", end.z, z)


@pytest.mark.parametrize(
  ("kind", "T"),
  [*((kind, 63) for kind in DECAYS), ("token", 1), ("channel", 7), ("none", 200), ("channel", 200)],
)
def test_output_state_and_every_gradient_equal_the_recurrence(kind, T):
  """The longest are 13 chunks, 14 in two groups."""
  check((*tokens(T), decay(kind, T), some_state()), chunk_size=16 if T == 200 else 32)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_normalized_with_a_feature_map_in_documents(kind):
  check(
    (*tokens(90), decay(kind, 90), some_state()),
    {"segment_ids": documents(90)},
    feature_map="elu_plus_one",
    normalize=True,
    chunk_size=8,
  )


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_tiny_decays_after_huge_ones_in_a_chunk_are_exact(kind):
  """A running sum of -10000s has an ulp of 0.06; the -0.001s and 0s after them must not be lost."""
  g = decay(kind, 64)
  choice = jax.random.choice(
    jax.random.key(5), jnp.array([-1e4, -1e-3, 0.0, -1e-3, -30.0]), g.shape
  )
  got = check((*tokens(64), choice, some_state()), chunk_size=64)
  assert np.all(np.asarray(got["gradient"]["log_decay"])[np.asarray(choice) == -1e4] == 0)
  burst = jnp.full_like(choice, -1e-3).at[:, :32].set(-1e4)
  check((*tokens(64), burst, some_state()), chunk_size=64)


def test_a_decay_of_minus_infinity_is_a_reset():
  g = decay("channel", 64).at[:, 40].set(-jnp.inf)
  q, k, v = tokens(64)
  out = linear_attention(q, k, v, log_decay=g, initial_state=some_state())
  alone = linear_attention(*(x[:, 40:] for x in (q, k, v)), log_decay=g[:, 40:])
  kit.assert_close("out", out[:, 40:], alone)
  gradient = jax.jit(jax.grad(lambda g: jnp.sum(linear_attention(q, k, v, log_decay=g) ** 2)))(g)
  assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("heads", [(1, 1, 4), (4, 2, 1), (2, 3, 6)], ids=str)
def test_queries_keys_and_values_may_each_be_shared(heads):
  """Heads of q, k and v that divide N equal the heads repeated by hand, in every form."""
  T, widths = 21, (H, H, h)
  make, total = kit.keys(4), max(heads)
  q, k, v = (jnp.abs(normal(next(make), B, T, n, w)) for n, w in zip(heads, widths, strict=True))
  g = -jnp.abs(normal(next(make), B, T, total, H))

  def repeated(x):
    return jnp.stack([x[:, :, n * x.shape[2] // total] for n in range(total)], axis=2)

  options = {"normalize": True, "bidirectional": True}

  def run(f, repeat, **more):
    def loss(q, k, v, g):
      out = f(*map(repeat, (q, k, v)), log_decay=g, **options, **more)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))

  got = run(linear_attention, lambda x: x, chunk_size=8)(q, k, v, g)
  with kit.double():
    want = run(reference, repeated)(*kit.to_double((q, k, v, g)))
  kit.assert_trees_close(got[0][1], want[0][1])
  kit.assert_trees_close(got[1], want[1], factor=3)
  kit.assert_close("reference", reference(q, k, v, log_decay=g, **options), want[0][1])
  one_state = linear_attention(q, k, v, bidirectional=True)
  kit.assert_close("one state", one_state, reference(*map(repeated, (q, k, v)), is_causal=False))

  want = linear_attention(*map(repeated, (q, k, v)), log_decay=g)
  sizes = {"num_heads": total, "num_kv_heads": heads[1], "head_dim": H, "value_dim": h}
  state = linear.init_state(B, max_length=T, **sizes)
  state, out = linear.prefill(state, *(x[:, :20] for x in (q, k, v)), log_decay=g[:, :20])
  kit.assert_close("prefill", out, want[:, :20])
  state, out = linear.step(state, *(x[:, 20] for x in (q, k, v)), log_decay=g[:, 20])
  kit.assert_close("step", out, want[:, 20])


def test_thousands_of_tokens_without_decay():
  T = 4096
  q, k, v = (jnp.abs(x) for x in tokens(T))
  out = linear_attention(q, k, v, log_decay=jnp.zeros((N,)), normalize=True)
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  kv = np.cumsum(np.repeat(k, 2, axis=2)[..., None] * np.repeat(v, 2, axis=2)[..., None, :], axis=1)
  z = np.cumsum(np.repeat(k, 2, axis=2), axis=1)
  want = np.einsum("btnm,btnmh->btnh", q, kv) / np.einsum("btnm,btnm->btn", q, z)[..., None]
  kit.assert_close("out", out, want)


def test_repeated_zero_huge_and_tiny_keys_and_values():
  q, k, v = tokens(70)
  g = decay("token", 70)
  k = k.at[:, 10:30].set(k[:, 10:11]).at[:, 40:60].set(0.0)
  out = linear_attention(q, k, v, log_decay=g)
  kit.assert_close("out", out, recurrence_in_numpy(q, k, v, g)[0])
  for factor in (2.0**80, 2.0**-80):
    kit.assert_close("v", linear_attention(q, k, v * factor, log_decay=g) / factor, out)
    kit.assert_close("k", linear_attention(q, k * factor, v, log_decay=g) / factor, out)


def test_a_row_whose_weights_are_zero_gives_zero_with_zero_gradient():
  q, k, v = tokens(20)
  q = q.at[:, 5].set(-1.0)
  k = k.at[:, :3].set(-1.0)

  def f(q, k, v):
    return linear_attention(q, k, v, feature_map="relu", normalize=True, chunk_size=8)

  out, pull = jax.vjp(f, q, k, v)
  assert np.all(np.asarray(out[:, 5]) == 0) and np.all(np.asarray(out[:, :3]) == 0)
  gradients = pull(jnp.ones_like(out))
  assert all(np.isfinite(np.asarray(x)).all() for x in gradients)
  assert np.all(np.asarray(gradients[0][:, 5]) == 0) and np.all(
    np.asarray(gradients[1][:, :3]) == 0
  )


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_packed_documents_equal_the_documents_alone(kind):
  bounds = [0, 5, 6, 41, 77]  # a document of one token, and one over three chunks
  q, k, v = tokens(77)
  g, state = decay(kind, 77), some_state()
  ids = jnp.asarray(np.repeat([7, 2, 7, 2], np.diff(bounds)), jnp.int32)[None].repeat(B, axis=0)
  run = functools.partial(linear_attention, return_state=True, chunk_size=16)
  out, end = run(q, k, v, log_decay=g, segment_ids=ids, initial_state=state)
  for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
    piece = [x[:, start:stop] for x in (q, k, v)]
    own = g if g is None or g.ndim == 1 else g[:, start:stop]
    want, last = run(*piece, log_decay=own, initial_state=state if start == 0 else None)
    kit.assert_close(f"out[{start}:{stop}]", out[:, start:stop], want)
  kit.assert_close("kv", end.kv, last.kv)


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_two_halves_through_the_state_equal_the_whole(kind):
  q, k, v = (jnp.abs(x) for x in tokens(61))
  g = decay(kind, 61)
  run = functools.partial(linear_attention, normalize=True, return_state=True, chunk_size=16)
  out, end = run(q, k, v, log_decay=g)
  cut = [None if g is None else g if g.ndim == 1 else g[:, s] for s in (slice(37), slice(37, 61))]
  first, middle = run(q[:, :37], k[:, :37], v[:, :37], log_decay=cut[0])
  rest = [x[:, 37:] for x in (q, k, v)]
  second, last = run(*rest, log_decay=cut[1], initial_state=middle)
  kit.assert_close("out", jnp.concatenate([first, second], axis=1), out)
  kit.assert_trees_close(last, end)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_reverse_is_forward_on_flipped_tokens(kind):
  q, k, v = tokens(45)
  g, ids = decay(kind, 45), documents(45)
  flip = functools.partial(jnp.flip, axis=1)
  flipped = g if g is None or g.ndim == 1 else flip(g)
  run = functools.partial(linear_attention, return_state=True, initial_state=some_state())
  out, end = run(q, k, v, log_decay=g, segment_ids=ids, reverse=True, chunk_size=16)
  want, last = reference(
    flip(q), flip(k), flip(v), log_decay=flipped, segment_ids=flip(ids), return_state=True,
    initial_state=some_state(),
  )  # fmt: skip
  kit.assert_close("out", out, flip(want))
  kit.assert_close("kv", end.kv, last.kv)
  again, _ = reference(
    q, k, v, log_decay=g, segment_ids=ids, reverse=True, return_state=True,
    initial_state=some_state(),
  )  # fmt: skip
  kit.assert_close("reference", again, flip(want))


def dense_both_ways(q, k, v, g, ids, normalize):
  """Every pair, weighed by what is decayed between the two, in NumPy."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  T = q.shape[1]
  g = np.zeros(N) if g is None else np.asarray(g, np.float64)
  g = g[None, None, :, None] if g.ndim == 1 else g[..., None] if g.ndim == 3 else g
  g = np.broadcast_to(g, (B, T, N, H))
  out = np.zeros((B, T, N, h))
  for t in range(T):
    score = np.zeros((B, T, N))
    for s in range(T):
      between = g[:, s + 1 : t + 1].sum(1) if s < t else g[:, t:s].sum(1)
      score[:, s] = (
        np.sum(q[:, t] * k[:, s] * np.exp(between), -1) * (ids[:, t] == ids[:, s])[:, None]
      )
    out[:, t] = np.einsum("bsn,bsnh->bnh", score, v)
    if normalize:
      out[:, t] /= score.sum(1)[..., None]
  return out


@pytest.mark.parametrize(
  ("kind", "packed"), [("none", False), ("head", True), ("token", True), ("channel", False)]
)
def test_bidirectional_equals_the_dense_formula(kind, packed):
  q, k, v = (jnp.abs(x) for x in tokens(29))
  g = decay(kind, 29)
  ids = documents(29) if packed else None
  for normalize in (False, True):
    options = {"log_decay": g, "segment_ids": ids, "normalize": normalize}
    want = dense_both_ways(
      q, k, v, g, np.zeros((B, 29)) if ids is None else np.asarray(ids), normalize
    )
    got = linear_attention(q, k, v, bidirectional=True, chunk_size=8, **options)
    kit.assert_close("chunked", got, want)
    kit.assert_close("reference", reference(q, k, v, is_causal=False, **options), want)


@pytest.mark.parametrize("kind", ["none", "token", "channel"])
def test_chunk_sizes_change_only_the_last_bits(kind):
  q, k, v = tokens(100)
  g = decay(kind, 100)
  want = linear_attention(q, k, v, log_decay=g, chunk_size=1)
  for chunk_size in (4, 32, 256):
    got = linear_attention(q, k, v, log_decay=g, chunk_size=chunk_size)
    kit.assert_close(f"chunk_size={chunk_size}", got, want)


@pytest.mark.parametrize("feature_map", ["identity", "taylor", "cosformer", "favor"])
def test_the_future_does_not_touch_the_past_and_runs_repeat_bitwise(feature_map):
  q, k, v = tokens(50)
  g = decay("token", 50)
  run = jax.jit(
    functools.partial(linear_attention, feature_map=feature_map, normalize=True, chunk_size=16)
  )
  out = run(q, k, v, log_decay=g)
  kit.assert_same("again", run(q, k, v, log_decay=g), out)
  q, k, v, g = (x.at[:, 21:].multiply(50.0) for x in (q, k, v, g))
  kit.assert_same("past", run(q, k, v, log_decay=g)[:, :21], out[:, :21])


@pytest.mark.parametrize("kind", ["none", "token", "channel"])
def test_bfloat16_inputs_lose_only_their_own_rounding(kind):
  q, k, v = (x.astype(jnp.bfloat16) for x in tokens(150))
  g = decay(kind, 150)
  out = linear_attention(q, k, v, log_decay=g)
  assert out.dtype == jnp.bfloat16
  q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
  want = recurrence_in_numpy(q32, k32, v32, g)[0]
  kit.assert_close("out", out.astype(jnp.float32), want, "bfloat16")
  wide = linear_attention(q, k, v.astype(jnp.float32), log_decay=g)
  kit.assert_close("sums are float32", wide, want)


def test_gradients_have_gradients():
  q, k, v = tokens(20)
  g = decay("channel", 20)

  def sharpness(f, q, k, v, g):
    def gradient(*args):
      return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a[:3], log_decay=a[3]))), (0, 1, 2, 3))(*args)

    return sum(jnp.sum(x**2) for x in gradient(q, k, v, g))

  chunked = functools.partial(linear_attention, chunk_size=8)
  slopes = lambda f: jax.jit(jax.grad(functools.partial(sharpness, f), (0, 1, 2, 3)))
  got = slopes(chunked)(q, k, v, g)
  with kit.double():
    want = slopes(reference)(*kit.to_double((q, k, v, g)))
  kit.assert_trees_close(got, want)


def test_the_draw_of_a_feature_map_has_a_gradient():
  q, k, v = tokens(20)
  favor = feature_maps.favor(jax.random.key(0), H, 12)

  def loss(f, favor, q, k, v):
    return jnp.sum(jnp.sin(f(q, k, v, feature_map=favor, normalize=True)))

  gradient = lambda f: jax.jit(jax.grad(functools.partial(loss, f)))
  got = gradient(functools.partial(linear_attention, chunk_size=8))(favor, q, k, v)
  with kit.double():
    want = gradient(reference)(*kit.to_double((favor, q, k, v)))
  kit.assert_close("projection", got.projection, want.projection, factor=3)


def test_memory_grows_with_the_length_and_not_with_its_square():
  plain: Any = linear.linear_attention  # a program within a program takes more, with jax 0.11.2

  def extra(T):
    shape = jax.ShapeDtypeStruct((1, T, 4, 32), jnp.float32)
    g = jax.ShapeDtypeStruct((1, T, 4), jnp.float32)
    f = jax.grad(lambda q, k, v, g: jnp.sum(plain(q, k, v, log_decay=g)), (0, 1, 2, 3))
    memory: Any = jax.jit(f).lower(shape, shape, shape, g).compile().memory_analysis()
    return memory.temp_size_in_bytes

  size = 4 * 4096 * 4 * 32
  assert extra(4096) - extra(2048) < 2 * size  # twice the tokens: at most 4 more arrays like q


def test_vmap_and_shard_map_change_nothing():
  q, k, v = tokens(40)
  g = decay("channel", 40)
  favor = feature_maps.favor(jax.random.key(0), H, H)

  def f(favor, q, k, v, g):
    out = linear_attention(
      q, k, v, log_decay=g, feature_map=favor, normalize=True, chunk_size=16
    )  # fmt: skip
    return out

  def loss(f, *args):
    return jnp.sum(jnp.sin(f(*args)))

  every = (0, 1, 2, 3, 4)
  want, gradients = jax.jit(jax.value_and_grad(functools.partial(loss, f), every))(
    favor, q, k, v, g
  )
  one = lambda q, k, v, g: f(favor, q[None], k[None], v[None], g[None])[0]
  rows = jax.jit(jax.vmap(one))(q, k, v, g)
  kit.assert_close("vmap", rows, f(favor, q, k, v, g))
  mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.P("data", None, "heads")
  sharded = jax.shard_map(f, mesh=mesh, in_specs=(jax.P(), spec, spec, spec, spec), out_specs=spec)
  got, shards = jax.jit(jax.value_and_grad(functools.partial(loss, sharded), every))(
    favor, q, k, v, g
  )
  kit.assert_close("shard_map", got, want)
  kit.assert_trees_close(shards, gradients, factor=3)


@pytest.mark.parametrize("feature_map", ["identity", "elu_plus_one", "cosformer", "taylor"])
def test_ragged_prefill_and_steps_equal_the_parallel_form(feature_map):
  T, lengths = 24, jnp.array([0, 17], jnp.int32)
  options = {"feature_map": feature_map, "normalize": feature_map != "identity"}
  q, k, v = tokens(T)
  g = decay("token", T) if feature_map != "taylor" else None
  want = linear.attend(q, k, v, log_decay=g, **options)
  sizes = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "value_dim": h, "max_length": T}
  state = linear.init_state(B, dtype=jnp.bfloat16, **sizes, **options)
  cost = linear.cost(B, T, T, N, K, H, h, **options)
  assert cost.state_bytes == state.kv.nbytes + state.z.nbytes
  start = state
  state, out = linear.prefill(state, q, k, v, lengths=lengths, log_decay=g, **options)
  kit.assert_close("prefill", out[1, :17], want[1, :17])
  assert not np.any(np.asarray(out[0])) and not np.any(np.asarray(out[1, 17:]))
  jax.tree.map(lambda a, b: kit.assert_same("empty row", a[0], b[0]), state, start)
  step = jax.jit(functools.partial(linear.step, **options))
  rows = jnp.arange(B)
  for i in range(7):
    at = lengths + i
    one = [x[rows, at] for x in (q, k, v)]
    state, out = step(state, *one, log_decay=None if g is None else g[rows, at])
    kit.assert_close(f"step {i}", out, want[rows, at], factor=2)
  np.testing.assert_array_equal(np.asarray(state.position), [7, 24])


def test_padding_touches_neither_state_nor_gradient():
  q, k, v = tokens(40)
  g = decay("head", 40)
  ids = documents(40)
  run = functools.partial(linear_attention, return_state=True, chunk_size=16, log_decay=g)
  out, end = run(q, k, v, lengths=jnp.array([11, 33]), segment_ids=ids)
  for row, n in enumerate((11, 33)):
    want, last = run(q[:, :n], k[:, :n], v[:, :n], segment_ids=ids[:, :n])
    kit.assert_close("out", out[row, :n], want[row])
    kit.assert_close("kv", end.kv[row], last.kv[row])


def test_a_named_implementation_runs():
  q, k, v = tokens(8)
  got = linear_attention(q, k, v, implementation="reference")
  kit.assert_same("reference", got, reference(q, k, v))


def test_gradients_of_weights_whose_squares_float32_cannot_hold():
  """A derivative with w^-2 in it is NaN for w < 1e-19 and 0 for w > 1e19."""
  positions = np.arange(24)

  def dense(phi, q, k, v, g):
    exponent = g * (positions[:, None] - positions).astype(g.dtype)
    weights = jnp.tril(phi(q)[0, :, 0] @ phi(k)[0, :, 0].T * jnp.exp(exponent))
    return (weights @ v[0, :, 0] / weights.sum(-1, keepdims=True)).sum()

  def ours(phi, q, k, v, g):
    return linear.linear_attention(
      q, k, v, log_decay=g[None], feature_map=phi, normalize=True, chunk_size=4
    ).sum()

  make = kit.keys(5)
  q, k, v = (normal(next(make), 1, 24, 1, 3) for _ in range(3))
  elu, relu = feature_maps.elu_plus_one.function, feature_maps.relu.function
  few = abs(k).at[0, 6:].set(0.0)
  for name, phi, *inputs in (
    ("small", elu, q - 26, k - 26, v, jnp.float32(0.0)),
    ("fading", relu, abs(q), few, v, jnp.float32(-3.0)),
    ("great", relu, abs(q) * 1e10, abs(k) * 1e10, v, jnp.float32(-0.1)),
  ):
    gradients = lambda f, phi=phi: jax.jit(jax.grad(functools.partial(f, phi), (0, 1, 2, 3)))
    got = gradients(ours)(*inputs)
    with kit.double():
      want = gradients(dense)(*(np.asarray(x, np.float64) for x in inputs))
    for argument, x, y in zip("qkvg", got, want, strict=True):
      x, y = np.asarray(x, np.float64), np.asarray(y)
      error = np.abs(x - y).max() / np.abs(y).max()
      assert error < 2e-5, (name, argument, error)


def test_heads_may_be_cut_where_keys_are_whole():
  """Multi-query attention inside of `jax.shard_map`, with JAX's checks."""
  q, k, v = tokens(12)
  g = decay("token", 12)
  phi = feature_maps.favor(jax.random.key(0), H, H)
  whole = lambda phi, q, k, v, g: linear.linear_attention(
    q, k, v, log_decay=g, feature_map=phi, normalize=True, chunk_size=4
  )
  mesh = jax.make_mesh((4,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
  heads = jax.P(None, None, "heads")
  cut = jax.shard_map(
    whole, mesh=mesh, in_specs=(jax.P(), heads, jax.P(), jax.P(), heads), out_specs=heads
  )
  inputs = (phi, q, k[:, :, :1], v[:, :, :1], g)
  gradients = lambda f: jax.jit(jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2, 3, 4)))
  kit.assert_trees_close(gradients(cut)(*inputs), gradients(whole)(*inputs), factor=3)


def test_nothing_comes_of_nothing():
  q, k, v = tokens(4)
  state = some_state()
  for options in ({}, {"reverse": True}, {"bidirectional": True}, {"normalize": True}):
    f = functools.partial(linear.linear_attention, **options)
    assert f(q[:, :0], k[:, :0], v[:, :0]).shape == (B, 0, N, h)
    assert f(q[:0], k[:0], v[:0]).shape == (0, 4, N, h)
  out, after = linear.linear_attention(
    q[:, :0], k[:, :0], v[:, :0], initial_state=state, return_state=True
  )
  assert out.shape == (B, 0, N, h)
  kit.assert_trees_close(after, state)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_padding_is_neither_read_nor_written_whatever_it_holds(implementation):
  """NaN, and lengths in integers that do not reach to T."""
  q, k, v = tokens(200)
  g = decay("token", 200)
  lengths = jnp.array([40, 120], jnp.int8)
  pad = jnp.arange(200)[None, :, None, None] >= jnp.array([40, 120])[:, None, None, None]
  spoilt = [jnp.where(pad, jnp.nan, x) for x in (q, k, v)]
  run = functools.partial(
    linear.linear_attention, normalize=True, return_state=True, implementation=implementation
  )
  got = run(*spoilt, log_decay=g, lengths=lengths)
  for row, end in enumerate((40, 120)):
    inputs = (x[row : row + 1, :end] for x in (q, k, v))
    out, state = run(*inputs, log_decay=g[row : row + 1, :end])
    kit.assert_close("out", got[0][row, :end], out[0])
    kit.assert_close("padding", got[0][row, end:], 0 * q[row, end:, :, :h])
    kit.assert_trees_close(
      jax.tree.map(lambda x, row=row: x[row], got[1]), jax.tree.map(lambda x: x[0], state)
    )


def test_a_scale_may_be_learned():
  q, k, v = tokens(8)
  f = lambda scale, v: linear_attention(q, k, v, scale=scale).astype(jnp.float32).sum()
  kit.assert_close("scale", jax.grad(f)(jnp.float32(0.3), v), f(1.0, v))
  kit.assert_close("traced", jax.jit(f)(jnp.float32(0.3), v), f(0.3, v))
