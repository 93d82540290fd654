"""How much arithmetic a model asks for and a machine can do: the halves of model-flops utilization.

A multiply-add counts two. `count` walks a jaxpr, because XLA's own cost analysis counts the body of
a loop once. What a mechanism multiplies is taken from its `cost`: the figure does not depend on the
implementation, causal attention counts the pairs that the mask leaves, and what is computed
again for the backward pass does not count. The backward pass counts as two forward passes
(Chowdhery et al. 2022, "PaLM", appendix B, https://arxiv.org/abs/2204.02311).
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from attention import variants
from attention.modules.config import DecoderConfig
from attention.modules.decoder import Decoder


def count(fn: Callable[..., Any], *args: Any) -> float:
  """Operations of the matrix products and convolutions in `fn(*args)`.

  Arguments may be ShapeDtypeStructs: nothing is run.

  Raises:
    ValueError: a loop turns as often as its data say, or a kernel has no estimate.
  """
  return _walk(jax.make_jaxpr(fn)(*args).jaxpr)


def _walk(jaxpr: core.Jaxpr) -> float:
  return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn) -> float:
  name, params = eqn.primitive.name, eqn.params
  if name in _LEAVES:
    return _LEAVES[name](eqn)
  if name == "cond":
    return max(_walk(branch.jaxpr) for branch in params["branches"])
  inner = sum(_walk(jaxpr) for jaxpr in _inner(params))
  if name == "scan":
    return params["length"] * inner
  if name == "while" and inner:
    raise ValueError("a while loop holds matrix products, and how often it turns is not known")
  if name == "shard_map":
    return params["mesh"].size * inner
  return inner


def _inner(params: Mapping[str, Any]) -> list[core.Jaxpr]:
  """The jaxprs that an equation runs, whatever their parameters are called."""
  found = []
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def _dot(eqn: core.JaxprEqn) -> float:
  (contract, _), _ = eqn.params["dimension_numbers"]
  left = _shape(eqn.invars[0])
  return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(left[axis] for axis in contract)


def _convolution(eqn: core.JaxprEqn) -> float:
  kernel = _shape(eqn.invars[1])
  features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) / features


def _pallas(eqn: core.JaxprEqn) -> float:
  if eqn.params.get("cost_estimate") is None:
    raise ValueError("a Pallas kernel has no cost_estimate")
  return eqn.params["cost_estimate"].flops


_LEAVES: Mapping[str, Callable[[core.JaxprEqn], float]] = {
  "dot_general": _dot,
  "conv_general_dilated": _convolution,
  "pallas_call": _pallas,
}


class _Free(variants.Layer):
  """A mechanism whose attention costs nothing: it leaves what a model costs without it."""

  def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, **inputs: Any) -> jax.Array:
    del k, inputs
    N = max(q.shape[-2], v.shape[-2])
    return jnp.zeros((*q.shape[:-2], N, v.shape[-1]), q.dtype)


def forward(config: DecoderConfig, batch: int, tokens: int) -> float:
  """Operations of a forward pass over [batch, tokens]: attention by its cost, the rest walked."""
  layers = variants.parse(config.pattern)

  def run() -> jax.Array:
    free = [_Free(layer.name, layer.options) for layer in layers]
    model = Decoder(config, free, rngs=nnx.Rngs(0))
    return model(jnp.zeros((batch, tokens), jnp.int32))

  depth = [layers[i % len(layers)] for i in range(config.num_layers)]
  return count(run) + sum(_attention(layer, config, batch, tokens) for layer in depth)


def _attention(layer: variants.Layer, config: DecoderConfig, batch: int, tokens: int) -> float:
  heads = layer.mixer.heads(config)
  sizes = (heads.out, heads.k or heads.v, heads.key_dim, heads.value_dim)
  return layer.cost(batch, tokens, tokens, *sizes).flops


def train_step(config: DecoderConfig, batch: int, tokens: int) -> float:
  """Operations that a training step over [batch, tokens] asks for: three forward passes."""
  return 3 * forward(config, batch, tokens)


# Dense bfloat16 operations per second and device, as their makers publish them.
PEAKS: Mapping[str, float] = {
  "NVIDIA H200": 989e12,
  "NVIDIA H100": 989e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L4": 121e12,
  "Tesla T4": 65e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12,
}


def peak(device: jax.Device | None = None, devices: int = 1) -> float | None:
  """Operations per second of so many devices together; None for a device that is not known.

  A CPU's is measured, once per process, by multiplying matrices; its virtual devices share it. For
  others it is the published rate of dense bfloat16, also for a model in float32.
  """
  device = device or jax.devices()[0]
  if device.platform == "cpu":
    return _cpu_peak() * jax.process_count()
  known = [name for name in PEAKS if device.device_kind.startswith(name)]
  return PEAKS[max(known, key=len)] * devices if known else None


@functools.cache
def _cpu_peak(size: int = 768, repeats: int = 5) -> float:
  a = jax.device_put(np.ones((size, size), np.float32), jax.local_devices(backend="cpu")[0])
  product = jax.jit(jnp.matmul)
  product(a, a).block_until_ready()
  best = math.inf
  for _ in range(repeats):
    start = time.perf_counter()
    product(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
