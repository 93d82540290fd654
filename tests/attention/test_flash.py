"""The op on a chip's kernel, interpreted: lowered masks, every gradient, dispatch and reasons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

import kit
from attention import chips, explain, flash, make_dropout, masks
from attention import dot_product_attention as attend
from pallas_kernels import flash_hopper

CHIPS = {"hopper": ("NVIDIA H200", "cuda"), "tpu": ("TPU v5 lite", "tpu")}


@pytest.fixture(params=CHIPS, scope="module")
def name(request):
  """What was compiled for one chip is not for the next."""
  jax.clear_caches()
  yield request.param
  jax.clear_caches()


@pytest.fixture
def chip(name, monkeypatch):
  """A chip that is pretended to be here; its kernels run in the interpreter, races detected."""
  kind, platform = CHIPS[name]
  here = chips.Chip({"cuda": "gpu"}.get(platform, platform), kind)
  monkeypatch.setattr(chips, "current", lambda: here)
  for function in ("forward", "backward"):
    run = functools.partial(getattr(flash_hopper, function), on_chip=False)
    monkeypatch.setattr(flash_hopper, function, run)
  interpret = {
    "hopper": lambda: plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    "tpu": lambda: pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)),
  }
  with interpret[name]():
    yield name


def _case(chip, **shape):
  """float32 where the chip's kernel has it, so that comparisons are sharp."""
  return kit.Case(**shape, dtype="bfloat16" if chip == "hopper" else "float32")


def test_everything_at_once(chip):
  """Documents, a window, cap, slopes, sinks and dropout through output and log-sum-exp; every
  gradient by name.
  """
  case = _case(chip, B=2, T=70, S=90, N=4, K=2, H=32, h=32)
  q, k, v = case.inputs()
  make = kit.keys(5)
  extra = {
    "sinks": kit.normal(next(make), 4),
    "alibi_slopes": jax.random.uniform(next(make), (4,)),
  }
  ids = jnp.asarray(np.arange(90) // 37, jnp.int32)[None]
  mask = masks.causal(11) & masks.sliding_window(30) & masks.segments(ids[:, :70], ids)
  dropout = make_dropout(0.2, jax.random.key(1), 2, 4)

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, q, k, v, extra):
    def loss(q, k, v, extra):
      out, lse = attend(
        q, k, v, mask=mask, logit_cap=4.0, dropout=dropout, implementation=implementation,
        return_residual=True, **extra,
      )  # fmt: skip
      seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
      return jnp.sin(out.astype(seen.dtype)).sum() + jnp.cos(seen).sum(), (out, lse)

    found = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, extra)
    (_, (out, lse)), (dq, dk, dv, d_extra) = found
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, **d_extra}

  actual = run(chip, q, k, v, extra)
  with kit.double():
    expected = run("reference", *kit.to_double((q, k, v, extra)))
    expected = jax.tree.map(np.asarray, expected)
  # bfloat16 rounds p and dS to 8 bits before they are summed; the slopes sum 10^4 of them.
  kit.assert_trees_close(actual, expected, case.dtype, factor=2)


@pytest.mark.parametrize("mask", [None, ~masks.prefix(20)])
def test_keys_that_fill_no_block_are_not_seen(chip, mask):
  """Of 300 keys the last block is not whole, and whatever the mask asks of it is allowed."""
  case = _case(chip, B=1, T=70, S=300, N=2, K=1, H=32, h=32)

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, q, k, v):
    def loss(q, k, v):
      out, lse = attend(q, k, v, mask=mask, implementation=implementation, return_residual=True)
      return jnp.sin(out.astype(lse.dtype)).sum() + jnp.cos(lse).sum(), (out, lse)

    (_, (out, lse)), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))

  actual = run(chip, *case.inputs())
  with kit.double():
    expected = jax.tree.map(np.asarray, run("reference", *kit.to_double(case.inputs())))
  kit.assert_trees_close(actual, expected, case.dtype, factor=2)


@pytest.mark.parametrize("bias", [-1e9, -1.3e9, 3e4, -200.0])
def test_probabilities_of_great_scores_that_tie(chip, bias):
  """Beside such a score log S is lost; probabilities are 1 / S all the same, and every gradient is
  right. Half of the rows have it for every other key and less for the rest, half are as usual. A
  sink would take all of a row whose scores are that small.
  """
  case = _case(chip, B=1, T=70, S=300, N=2, K=1, H=32, h=32)
  q, k, v = case.inputs()
  great, even = jnp.arange(70) % 2 == 1, jnp.arange(300) % 2 == 0
  rows = jnp.where(even, bias, 2.0 * bias if bias < 0.0 else 0.0)
  given = {
    "q": jnp.where(great[:, None, None], 0.0, q).astype(q.dtype), "k": k, "v": v,
    "bias": jnp.where(great[:, None], rows, kit.normal(jax.random.key(7), 70, 300))[None, None],
    "sinks": jnp.array([-jnp.inf, 0.3 if bias > 0.0 else -jnp.inf]),
  }  # fmt: skip

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, given):
    def loss(given):
      out, lse = attend(
        *(given[name] for name in "qkv"), given["bias"], sinks=given["sinks"],
        implementation=implementation, return_residual=True,
      )  # fmt: skip
      return jnp.sin(out.astype(lse.dtype)).sum() + lse.sum(), out

    gradients, out = jax.grad(loss, has_aux=True)(given)
    return {"out": out} | gradients

  actual = run(chip, given)
  with kit.double():
    expected = jax.tree.map(np.asarray, run("reference", kit.to_double(given)))
  kit.assert_trees_close(actual, expected, case.dtype, factor=2)


def test_an_empty_row_and_a_second_derivative(chip):
  case = _case(chip, B=1, T=40, S=40, N=2, K=2, H=32, h=32)
  q, k, v = case.inputs()
  mask = masks.causal(-5)
  run = jax.jit(lambda q: attend(q, k, v, mask=mask, implementation=chip, return_residual=True))
  out, lse = run(q)
  assert (np.asarray(out[:, :5], np.float32) == 0).all() and (lse[:, :5] == -np.inf).all()
  loss = lambda q: run(q)[0].astype(jnp.float32).sum()
  gradient = jax.jit(jax.grad(loss))(q).astype(jnp.float32)
  assert np.isfinite(gradient).all() and (gradient[:, :5] == 0).all()
  with pytest.raises(NotImplementedError, match="differentiable once"):
    jax.grad(lambda q: jax.grad(loss)(q).astype(jnp.float32).sum())(q)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_choice_on_each_chip(chip):
  """The chip's kernel where it runs the call, O(T) memory where it does not, and why."""
  other = next(name for name in CHIPS if name != chip)
  x = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
  wide = jax.ShapeDtypeStruct((1, 4096, 8, 1024), jnp.bfloat16)
  with kit.pretend(*CHIPS[chip]):
    text = explain(attend, x, x, x, is_causal=True)
    assert text.startswith(f"dot_product_attention runs {chip!r}")
    assert f"not {other!r}: it needs a" in text
    text = explain(attend, wide, wide, wide, is_causal=True)
    assert text.startswith("dot_product_attention runs 'tiled'")
    assert f"not {chip!r}: head" in text
    with pytest.raises(NotImplementedError, match=f"{other!r} cannot run this call: it needs"):
      explain(attend, x, x, x, implementation=other)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_mask_that_holds_an_array_is_not_a_kernels(chip):
  x = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
  table = jnp.arange(4096) // 37
  mask = masks.from_function(lambda q, k: table[q] == table[k])
  with kit.pretend(*CHIPS[chip]):
    text = explain(attend, x, x, x, mask=mask)
  assert text.startswith("dot_product_attention runs 'tiled'")
  assert f"not {chip!r}: its mask's function holds an array of its own, int32[4096]" in text


def test_on_a_cpu_it_stays_tiled():
  x = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
  text = explain(attend, x, x, x, is_causal=True)
  assert text.startswith("dot_product_attention runs 'tiled'")
  assert "not 'hopper': it needs a Hopper GPU and this is cpu" in text
  call = functools.partial(attend, implementation="tpu")
  with pytest.raises(NotImplementedError, match="it needs a TPU v4 or newer and this is cpu"):
    call(*(jnp.zeros((1, 8, 2, 64)) for _ in range(3)))


def test_kernels_are_imported_when_they_are_asked_about():
  assert flash._kernel("hopper") is flash_hopper


def test_vmap_and_the_checks_of_shard_map(chip):
  """A mapped call is the whole call; where outputs would have to be typed it says what to do."""
  case = _case(chip, B=2, T=24, S=24, N=2, K=2, H=32, h=32)
  q, k, v = case.inputs()
  run = functools.partial(attend, is_causal=True, implementation=chip)
  one = lambda q, k, v: run(q[None], k[None], v[None])[0]

  def both(run):
    def loss(q):
      out = run(q, k, v)
      return out.astype(jnp.float32).sum(), out

    dq, out = jax.jit(jax.grad(loss, has_aux=True))(q)
    return {"out": out, "dq": dq}

  kit.assert_trees_close(both(jax.vmap(one)), both(run), case.dtype)
  mesh = jax.make_mesh((2,), ("rows",))
  moved = jax.device_put((q, k, v), jax.NamedSharding(mesh, jax.P("rows")))
  sharded = jax.shard_map(run, mesh=mesh, in_specs=(jax.P("rows"),) * 3, out_specs=jax.P("rows"))
  with pytest.raises(NotImplementedError, match="inside of shard_map it needs check_vma=False"):
    jax.jit(sharded)(*moved)
