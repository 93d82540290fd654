"""Who is compiled: a name -> how to build its forward or backward pass of a shape.

Ours and the peers, adapted as their owners mean them to be called. What a peer cannot do is said by
its own error, which becomes its row.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from experiments.compiling import hardmax, linear, ours
from experiments.compiling.shapes import BACKWARD, FORWARD, STEP, Shape, trips
from experiments.compiling.work import Built, Work
from pallas_kernels import linear_hopper

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
  """A contender on one platform."""

  platform: str
  """"cuda" or "tpu"."""
  build: Callable[[Any, str, Settings], Built]
  """(shape of its mechanism, kind, settings) -> what is compiled."""
  settings: Mapping[str, tuple[Settings, ...]]
  """Kind of pass -> what is tried; the best counts."""
  mechanism: str = "flash"
  ours: bool = False
  module: str = ""
  """What has to be importable, if it may be absent."""
  widest: int = 256
  """Of the heads that it takes."""

  @property
  def absent(self) -> str | None:
    """Why it cannot be compiled here, or None."""
    if self.module and importlib.util.find_spec(self.module.split(".")[0]) is None:
      return f"{self.module.split('.')[0]} is not installed (pip install 'frugal-attention[peers]')"
    return None


def _heads_first(shape: Shape, N: int, width: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((N, shape.T, width), jnp.bfloat16)


def _gradients(function: Callable[..., Any]) -> Callable[..., Any]:
  """(q, k, v, d_out) -> (dq, dk, dv), the forward pass included."""

  def backward(q, k, v, d_out):
    return jax.vjp(function, q, k, v)[1](d_out)

  return backward


def _passes(
  kind: str, function: Callable[..., Any], qkv: tuple[Any, ...], out: Any, works: Mapping[str, Any]
) -> Built:
  if kind == FORWARD:
    return Built(function, qkv, works[kind])
  return Built(_gradients(function), (*qkv, out), works[kind])


def tpu_flash(shape: Shape, kind: str, settings: Settings) -> Built:
  """jax's first flash kernel for TPUs. It knows neither grouped queries nor windows."""
  library = importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")
  block = settings["block"]
  if shape.window is not None or shape.documents > 1:
    raise NotImplementedError("only the causal mask is compared with jax's TPU flash attention")
  sizes = library.BlockSizes(
    block_q=block, block_k_major=block, block_k=block, block_b=1,
    block_q_major_dkv=block, block_k_major_dkv=block, block_k_dkv=block, block_q_dkv=block,
    block_k_major_dq=block, block_k_dq=block, block_q_dq=block,
  )  # fmt: skip
  attend = lambda q, k, v: library.flash_attention(
    q[None], k[None], v[None], causal=True, sm_scale=shape.H**-0.5,
    block_sizes=sizes,
  )[0]  # fmt: skip
  q, k, v, out = (
    _heads_first(shape, shape.N, w) for w in (shape.H, shape.H, shape.h, shape.h)
  )  # keys are repeated for each query head
  works = {
    FORWARD: (Work(r"flash_attention.*", trips(shape, block, block)),),
    BACKWARD: (
      Work(r".*dkv.*", trips(shape, block, block, by_key=True)),
      Work(r".*dq.*", trips(shape, block, block)),
    ),
  }
  return _passes(kind, attend, (q, k, v), out, works)


def _splash_mask(library: Any, shape: Shape) -> Any:
  if shape.documents > 1:
    raise NotImplementedError("packed documents are not compared with splash attention")
  if shape.window is not None:
    return library.LocalMask((shape.T, shape.T), (shape.window - 1, 0), 0)
  return library.CausalMask((shape.T, shape.T))


def _splash_arrays(shape: Shape) -> list[jax.ShapeDtypeStruct]:
  """q, k, v and the output."""
  heads = ((shape.N, shape.H), (shape.K, shape.H), (shape.K, shape.h), (shape.N, shape.h))
  return [_heads_first(shape, *head) for head in heads]


def splash(shape: Shape, kind: str, settings: Settings) -> Built:
  """jax's splash attention; backward fused (one kernel) or not (two)."""
  home = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_"
  kernels, masks = (importlib.import_module(home + part) for part in ("kernel", "mask"))
  block_q, block_k, compute = settings["blocks"]
  fused = settings.get("fused", True)
  sizes = kernels.BlockSizes(
    block_q=block_q, block_kv=block_k, block_kv_compute=compute,
    block_q_dkv=block_q, block_kv_dkv=block_k, block_kv_dkv_compute=compute,
    block_q_dq=None if fused else block_q, block_kv_dq=None if fused else block_k,
    use_fused_bwd_kernel=fused,
  )  # fmt: skip
  mask = masks.MultiHeadMask([_splash_mask(masks, shape)] * shape.N)
  kernel = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
  attend = lambda q, k, v: kernel(q * jnp.bfloat16(shape.H**-0.5), k, v)
  *qkv, out = _splash_arrays(shape)
  # A grid is as wide as its widest row: for a window, steps are about those visited.
  count = functools.partial(trips, shape, block_q, block_k, all_steps=shape.window is None)
  works = {
    FORWARD: (Work(r"splash_mha_fwd.*", count()),),
    BACKWARD: (Work(r"splash_mha_dkv.*", count(by_key=True)),)
    + (() if fused else (Work(r"splash_mha_dq.*", count()),)),
  }
  return _passes(kind, attend, tuple(qkv), out, works)


def tokamax_splash(shape: Shape, kind: str, settings: Settings) -> Built:
  """tokamax's splash attention; its grid has a step for each visited block and no parallel axis."""
  home = "tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_"
  kernels, masks = (importlib.import_module(home + part) for part in ("kernel", "mask"))
  block_q, block_k, compute = settings["blocks"]
  config = kernels.SplashConfig(
    block_q=block_q, block_kv=block_k, block_kv_compute=compute,
    block_q_dkv=block_q, block_kv_dkv=block_k, block_kv_dkv_compute=compute,
  )  # fmt: skip
  kernel = kernels.make_splash_mha(_splash_mask(masks, shape), config=config, q_seq_shards=1)
  attend = lambda q, k, v: kernel(q * jnp.bfloat16(shape.H**-0.5), k, v)
  *qkv, out = _splash_arrays(shape)
  count = functools.partial(trips, shape, block_q, block_k, all_steps=False)
  works = {
    FORWARD: (Work(r"splash_mha_fwd.*", count(), parallel=False),),
    BACKWARD: (Work(r"splash_mha_dkv.*", count(by_key=True), parallel=False),),
  }
  return _passes(kind, attend, tuple(qkv), out, works)


def mgpu(shape: Shape, kind: str, settings: Settings) -> Built:
  """jax's Mosaic GPU attention. Its buffers are float16 whatever it is given, so it is given that;
  its backward pass knows no mask, so it has a row without one.
  """
  library = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
  block_q, block_k, stages = settings["blocks"]
  if shape.window is not None or shape.documents > 1:
    raise NotImplementedError("jax's Mosaic GPU attention has no window and no documents")
  if shape.h != shape.H:
    raise NotImplementedError("jax's Mosaic GPU attention has one head width")
  config = library.TuningConfig(
    block_q=block_q, block_kv=block_k, max_concurrent_steps=stages, causal=settings["causal"],
    block_q_dkv=block_q, block_kv_dkv=64, block_q_dq=block_q, block_kv_dq=64,
  )  # fmt: skip
  attend = lambda q, k, v: library.attention(q, k, v, config)
  array = lambda heads: jax.ShapeDtypeStruct((1, shape.T, heads, shape.H), jnp.float16)
  qkv = (array(shape.N), array(shape.K), array(shape.K))
  return _passes(kind, attend, qkv, array(shape.N), {FORWARD: (), BACKWARD: ()})


def _settings(
  forward: tuple[Settings, ...], backward: tuple[Settings, ...]
) -> Mapping[str, tuple[Settings, ...]]:
  return {FORWARD: forward, BACKWARD: backward}


_EACH: Final = {FORWARD: ({},), BACKWARD: ({},), STEP: ({},)}

PROGRAMS: Final[Mapping[str, Program]] = {
  "ours-hopper": Program(
    platform="cuda", build=functools.partial(ours.build, "hopper"), ours=True,
    settings=_settings(({},), ({},)),
  ),
  "ours-tpu": Program(
    platform="tpu", build=functools.partial(ours.build, "tpu"), ours=True,
    settings=_settings(({},), ({},)),
  ),
  "jax-mgpu": Program(
    platform="cuda", build=mgpu,
    settings=_settings(
      ({"blocks": (64, 128, 2), "causal": True}, {"blocks": (64, 64, 2), "causal": True}),
      ({"blocks": (64, 64, 2), "causal": True}, {"blocks": (64, 64, 2), "causal": False}),
    ),
  ),
  "jax-flash": Program(
    platform="tpu", build=tpu_flash,
    settings=_settings(({"block": 512}, {"block": 1024}), ({"block": 512}, {"block": 1024})),
  ),
  "jax-splash": Program(
    platform="tpu", build=splash,
    settings=_settings(
      ({"blocks": (512, 1024, 512)}, {"blocks": (1024, 1024, 512)}, {"blocks": (1024, 2048, 512)}),
      ({"blocks": (512, 1024, 512)}, {"blocks": (1024, 1024, 512)},
       {"blocks": (512, 1024, 512), "fused": False}),
    ),
  ),
  "tokamax-splash": Program(
    platform="tpu", build=tokamax_splash, module="tokamax",
    settings=_settings(
      ({"blocks": (512, 1024, 512)}, {"blocks": (1024, 1024, 512)}, {"blocks": (1024, 2048, 512)}),
      ({"blocks": (512, 1024, 512)}, {"blocks": (1024, 1024, 512)}),
    ),
  ),
  "linear-hopper": Program(
    platform="cuda", build=functools.partial(linear.build, "hopper"), settings=_EACH,
    mechanism="linear", ours=True,
  ),
  "linear-hopper-float32": Program(
    platform="cuda", build=functools.partial(linear.build, "hopper"), mechanism="linear", ours=True,
    settings={kind: ({"dtype": "float32"},) for kind in _EACH},
    widest=linear_hopper.WIDEST_FLOAT32,
  ),
  "linear-tpu": Program(
    platform="tpu", build=functools.partial(linear.build, "tpu"), settings=_EACH,
    mechanism="linear", ours=True,
  ),
  "linear-xla": Program(
    platform="tpu", build=functools.partial(linear.build, "chunked"), settings=_EACH,
    mechanism="linear",
  ),
  "hardmax-hopper": Program(
    platform="cuda", build=functools.partial(hardmax.build, "hopper"), settings={FORWARD: ({},)},
    mechanism="hardmax", ours=True,
  ),
  "hardmax-tpu": Program(
    platform="tpu", build=functools.partial(hardmax.build, "tpu"), settings={FORWARD: ({},)},
    mechanism="hardmax", ours=True,
  ),
}  # fmt: skip
