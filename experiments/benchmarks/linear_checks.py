"""Whether an implementation of linear attention is right on this chip: outputs, states, gradients.

The truth is the recurrence in float32 on the same numbers. Kernels round states and scores to
bfloat16 where XLA's `chunked` form does not, so what an error may be is that of `checks.py` with
the tests' share for bfloat16. Each program runs twice and must give the same bits.

    python -m experiments.benchmarks.linear_checks IMPLEMENTATION NAME...
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from attention import linear_attention
from attention.chunk_scan import State
from attention.ops import linear
from experiments.benchmarks import checks

# What an error may be beyond twice that of XLA, as a share of the largest true value.
SHARE: Final = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
  """One call and its gradients, or one token more."""

  name: str
  B: int = 2
  T: int = 512
  Nq: int = 4
  K: int = 4
  Kv: int = 4
  M: int = 64
  h: int = 64
  dtype: str = "bfloat16"
  decay: str = "token"
  """"none", "head", "token" or "channel"."""
  normalize: bool = False
  documents: int = 0
  """Their mean length, packed; 0 is one."""
  lengths: bool = False
  """Whether rows end before T."""
  reverse: bool = False
  harsh: bool = False
  """Decays of 0, -1e-3, -30 and -10000 side by side, and keys that repeat."""
  step: bool = False

  @property
  def N(self) -> int:
    """Heads of the state."""
    return max(self.Nq, self.Kv)

  def share(self, name: str) -> float:
    """What a quantity's error may be beyond twice that of XLA, of its largest true value."""
    return SHARE["float32" if self.step and name == "kv" else self.dtype]


CHECKS: Final[tuple[Check, ...]] = (
  Check(name="token"),
  Check(name="token, H=128", M=128, h=128, T=1024),
  Check(name="channel, H=128", M=128, h=128, T=1024, decay="channel"),
  Check(name="token, H=256", M=256, h=256, Nq=2, K=2, Kv=2),
  Check(name="channel, H=256", M=256, h=256, Nq=2, K=2, Kv=2, decay="channel"),
  Check(name="no decay", decay="none"),
  Check(name="a decay of each head", decay="head"),
  Check(name="channel", decay="channel"),
  Check(name="token, float32", dtype="float32"),
  Check(name="channel, float32, odd T", dtype="float32", T=333, decay="channel", M=128, h=128),
  Check(name="token, odd T", T=333, M=40, h=72),
  Check(name="channel, odd T", T=517, M=72, h=40, decay="channel"),
  Check(name="one token", T=1),
  Check(name="one chunk and a token, channel", T=65, decay="channel"),
  Check(name="normalized", normalize=True, decay="none"),
  Check(name="token, normalized", normalize=True),
  Check(name="channel, normalized", normalize=True, decay="channel"),
  Check(name="queries share keys and values", Nq=8, K=2, Kv=2),
  Check(name="values share queries and keys", Nq=1, K=1, Kv=8, M=128),
  Check(name="channel, values share queries and keys", Nq=2, K=2, Kv=4, decay="channel"),
  Check(name="documents", documents=60),
  Check(name="documents, channel, normalized", documents=60, decay="channel", normalize=True),
  Check(name="documents, no decay", documents=100, decay="none", M=128, h=128),
  Check(name="padding", lengths=True, decay="channel"),
  Check(name="from the end", reverse=True, T=300),
  Check(name="harsh", harsh=True),
  Check(name="harsh, channel", harsh=True, decay="channel"),
  Check(name="everything at once", T=333, Nq=4, K=2, M=96, h=128, decay="channel", normalize=True,
        documents=50, reverse=True),
  Check(name="long", B=1, Nq=2, K=2, Kv=2, M=128, h=128, T=8192),
  Check(name="long, channel", B=1, Nq=2, K=2, Kv=2, M=128, h=128, T=8192, decay="channel"),
  Check(name="one token more", step=True, M=128, h=128),
  Check(name="one token more, channel, normalized", step=True, decay="channel", normalize=True,
        M=40, h=96, Nq=4, K=2, Kv=2),
)  # fmt: skip


def operands(check: Check) -> dict[str, jax.Array]:
  """Every array that has a gradient, by its name; `kv` and `z` are the state that enters."""
  draw = iter(jax.random.split(jax.random.key(0), 8))
  normal = lambda *shape: jax.random.normal(next(draw), shape)
  B, T, N, M, h = check.B, check.T, check.N, check.M, check.h
  q, k = normal(B, T, check.Nq, M) * M**-0.5, normal(B, T, check.K, M)
  if check.harsh:
    k = jnp.broadcast_to(k[:, :1], k.shape) + 0.01 * k
  if check.normalize:
    q, k = jnp.abs(q), jnp.abs(k)
  arrays = {"q": q, "k": k, "v": normal(B, T, check.Kv, h)}
  arrays = {name: x.astype(check.dtype) for name, x in arrays.items()}
  arrays |= {"kv": normal(B, N, M, h), "z": jnp.abs(normal(B, N, M))}
  shapes = {"head": (N,), "token": (B, T, N), "channel": (B, T, N, M)}
  if check.decay in shapes:
    arrays["log_decay"] = _decays(check, next(draw), shapes[check.decay])
  return arrays


def _decays(check: Check, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  g = jax.nn.log_sigmoid(jax.random.normal(key, shape)) / (1 if len(shape) > 1 else 16)
  if check.harsh:
    odd = jax.random.choice(key, jnp.array([0.0, -1e-3, -30.0, -1e4]), shape)
    g = jnp.where(jax.random.bernoulli(key, 0.3, shape), odd, g)
  return g


def program(check: Check, implementation: str) -> Callable[..., dict[str, jax.Array]]:
  """(operands, cotangents of output and state) -> results and every gradient, by name."""
  if check.step:
    return functools.partial(_step, check, implementation)

  def attend(arrays):
    q, k, v, kv, z, *g = (arrays[name] for name in _order(arrays))
    results: Any = linear_attention(
      q, k, v, log_decay=g[0] if g else None, normalize=check.normalize, scale=1.0,
      initial_state=State(kv, z), return_state=True, reverse=check.reverse,
      segment_ids=_ids(check), lengths=_lengths(check), implementation=implementation,
    )  # fmt: skip
    out, state = results
    return (out, state.kv, state.z) if check.normalize else (out, state.kv)

  def run(arrays, cotangents):
    exact = "highest" if arrays["q"].dtype == jnp.float32 else None
    with jax.default_matmul_precision(exact):
      results, pull = jax.vjp(attend, arrays)
      given = zip(cotangents, results, strict=False)
      (gradients,) = pull(tuple(x.astype(like.dtype) for x, like in given))
    unused = () if check.normalize else ("z",)
    named = {f"d {name}": x for name, x in gradients.items() if name not in unused}
    return dict(zip(("out", "kv", "z"), results, strict=False)) | named

  return run


def _order(arrays: dict[str, jax.Array]) -> list[str]:
  return [name for name in ("q", "k", "v", "kv", "z", "log_decay") if name in arrays]


def _ids(check: Check) -> jax.Array | None:
  """Document numbers `B T`."""
  if not check.documents:
    return None
  ends = np.random.default_rng(0).random((check.B, check.T)) < 1 / check.documents
  return jnp.asarray(np.cumsum(ends, axis=1), jnp.int32)


def _lengths(check: Check) -> jax.Array | None:
  if not check.lengths:
    return None
  return jnp.asarray([check.T - 7 * row - 1 for row in range(check.B)], jnp.int32)


def _step(
  check: Check, implementation: str, arrays: dict[str, jax.Array], cotangents: Any
) -> dict[str, jax.Array]:
  """The last token, after the state that is given."""
  del cotangents
  g = arrays.get("log_decay")
  last = lambda x: x[:, -1] if x.ndim > 1 else x
  state = linear.DecodeState(arrays["kv"], arrays["z"], jnp.zeros((check.B,), jnp.int32))
  with jax.default_matmul_precision("highest"):
    state, out = linear.step(
      state, *(last(arrays[name]) for name in "qkv"), log_decay=None if g is None else last(g),
      normalize=check.normalize, implementation=implementation,
    )  # fmt: skip
  return {"out": out, "kv": state.kv}


def cotangents(check: Check) -> tuple[jax.Array, ...]:
  """Of the output, and of both parts of the state."""
  B, T, N, M, h = check.B, check.T, check.N, check.M, check.h
  shapes = ((B, T, N, h), (B, N, M, h), (B, N, M))
  keys = jax.random.split(jax.random.key(1), 3)
  return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def compiled(check: Check, implementation: str) -> dict[str, Any]:
  """The programs and what they are called with, not yet run: the truth, XLA's answer and ours."""
  arrays = operands(check)
  exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
  gradients = cotangents(check)
  oracle, plain = ("xla", "xla") if check.step else ("reference", "chunked")
  ours = "xla" if check.step and implementation in ("chunked", "reference") else implementation
  programs = {"truth": (oracle, exact), "plain": (plain, arrays), "ours": (ours, arrays)}
  found = {}
  for who, (name, given) in programs.items():
    lowered = jax.jit(program(check, name)).lower(given, gradients)
    found[who] = (lowered.compile(), (given, gradients))
  return found


run = functools.partial(checks.run, known=CHECKS, module=__name__)


def main(implementation: str, *names: str) -> None:
  """The checks of these names."""
  checks.serve(implementation, names, CHECKS, compiled)


if __name__ == "__main__":
  main(*sys.argv[1:])
