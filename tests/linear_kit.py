"""What the tests of the linear-attention kernels share: calls, and their oracle in float64."""

import functools
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kit
from pallas_kernels import linear
from pallas_kernels.linear import Normalized, Settings, State

DECAYS = ("none", "head", "token", "channel")


class Problem(NamedTuple):
  """One call of a kernel, forward and backward."""

  T: int = 100
  B: int = 2
  Nq: int = 2
  K: int = 2
  Kv: int = 2
  M: int = 32
  h: int = 32
  decay: str = "token"
  normalize: bool = False
  scale: float = 1.0
  dtype: str = "float32"
  document: int = 0
  """A document begins every so many tokens, where every decay is FORGET; 0 is one document."""
  harsh: bool = False
  """Decays of 0, -1e-3, -30 and FORGET side by side, and keys that repeat."""

  @property
  def N(self) -> int:
    """The heads of the state."""
    return max(self.Nq, self.Kv)

  @property
  def settings(self) -> Settings:
    """As the kernel gets them."""
    return Settings(self.scale, self.normalize)

  def inputs(self) -> dict[str, Any]:
    """q, k, v, g, the state that enters, and the gradients that come back, by name.

    NumPy makes them: in JAX every operation and shape would be a program.
    """
    make = kit.keys(5)
    normal = lambda *shape: np.asarray(kit.normal(next(make), *shape))
    q = normal(self.B, self.T, self.Nq, self.M) * self.M**-0.5
    k, v = normal(self.B, self.T, self.K, self.M), normal(self.B, self.T, self.Kv, self.h)
    if self.harsh:
      k = k[:, :1] + 0.01 * k
    if self.normalize:
      q, k = np.abs(q), np.abs(k)
    state = State(normal(self.B, self.N, self.M, self.h), None)
    d_state = State(normal(self.B, self.N, self.M, self.h), None)
    if self.normalize:
      state = state._replace(z=np.abs(normal(self.B, self.N, self.M)))
      d_state = d_state._replace(z=normal(self.B, self.N, self.M))
    d_out = normal(self.B, self.T, self.N, self.h)
    q, k, v, d_out = (x.astype(jnp.dtype(self.dtype)) for x in (q, k, v, d_out))
    g = self._decays(next(make))
    named = {"q": q, "k": k, "v": v, "g": g, "state": state, "d_out": d_out, "d_state": d_state}
    return jax.device_put(named)

  def _decays(self, key: jax.Array) -> np.ndarray | None:
    B, T, N = self.B, self.T, self.N
    shapes = {"none": None, "head": (N,), "token": (B, T, N), "channel": (B, T, N, self.M)}
    shape = shapes[self.decay]
    if shape is None:
      return None
    g = -np.logaddexp(0, -np.asarray(kit.normal(key, *shape))) / 8
    if self.harsh:
      choices = np.array([0.0, -1e-3, -30.0, linear.FORGET], np.float32)
      change = jax.random.bernoulli(key, 0.3, shape), jax.random.choice(key, choices, shape)
      g = np.where(*map(np.asarray, change), g)
    if self.document and len(shape) > 1:
      begins = (np.arange(T) % self.document == 0) & (np.arange(T) > 0)
      begins = begins.reshape((1, T) + (1,) * (len(shape) - 2))
      g = np.where(begins, np.float32(linear.FORGET), g)
    return g


# Interpreted kernels are slow: a few calls, the same in every run.
FEW = hypothesis.settings(
  max_examples=3,
  deadline=None,
  derandomize=True,
  database=None,
  phases=[hypothesis.Phase.generate],
)


@st.composite
def problems(draw: st.DrawFn, *, longest: int, dtype: str) -> Problem:
  """Small calls of every decay, odd lengths and widths, shared heads, documents, normalizers."""
  Nq, K, Kv = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1)]))
  normalize = draw(st.booleans())
  return Problem(
    T=draw(st.integers(1, longest)), B=1, Nq=Nq, K=K, Kv=Kv, M=draw(st.integers(1, 72)),
    h=draw(st.integers(1, 72)), decay=draw(st.sampled_from(DECAYS)), normalize=normalize,
    scale=1.0 if normalize else draw(st.sampled_from([0.3, 1.0])), dtype=dtype,
    document=draw(st.sampled_from([0, 7, 50])), harsh=draw(st.booleans()),
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("settings", "hold"))
def recurrence(
  q, k, v, g, state: State, settings: Settings, *, hold: bool = False
) -> tuple[jax.Array, State]:
  """(out, state), token by token, in the dtype of what it is given. With `hold` a weight has no
  derivative.
  """
  B, T = q.shape[:2]
  N = max(q.shape[2], v.shape[2])
  q, k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (q, k, v))
  if g is None:
    g = jnp.zeros((N,), q.dtype)
  g = g[None, None, :, None] if g.ndim == 1 else g[..., None] if g.ndim == 3 else g
  a = jnp.broadcast_to(jnp.exp(g), (B, T, N, q.shape[3]))
  z = jnp.zeros((B, N, q.shape[3]), q.dtype) if state.z is None else state.z

  def token(carry, x):
    kv, z = carry
    q, k, v, a = x
    kv = a[..., None] * kv + k[..., None] * v[..., None, :]
    z = a * z + k
    out = jnp.einsum("bnm,bnmh->bnh", q, kv)
    if settings.normalize:
      weight = jnp.einsum("bnm,bnm->bn", q, z)[..., None]
      weight = lax.stop_gradient(weight) if hold else weight
      out = jnp.where(weight == 0, 0, out / jnp.where(weight == 0, 1, weight))
    else:
      out = out * settings.scale
    return (kv, z), out

  (kv, z), out = lax.scan(
    token, (state.kv, z), jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, a))
  )
  return out.swapaxes(0, 1), State(kv, z if settings.normalize else None)


def expected(problem: Problem) -> dict[str, Any]:
  """out, state and every gradient by the recurrence and automatic differentiation in float64."""

  @jax.jit
  def differentiate(x):
    call = functools.partial(recurrence, settings=problem.settings)
    (out, state), pull = jax.vjp(call, x["q"], x["k"], x["v"], x["g"], x["state"])
    return out, state, pull((x["d_out"], x["d_state"]))

  inputs = problem.inputs()
  with kit.double():
    return _named(*differentiate(kit.to_double(inputs)))


def dq_terms(problem: Problem) -> float:
  """The size of the two terms of a normalized dq, through the output and through the weight. Where
  all that a query sees is alike they are equal and their sum is nothing.
  """

  @jax.jit
  def through_the_output(x):
    held = functools.partial(recurrence, settings=problem.settings, hold=True)
    out = lambda q: held(q, x["k"], x["v"], x["g"], x["state"])[0]
    return jax.vjp(out, x["q"])[1](x["d_out"])

  with kit.double():
    (dq,) = through_the_output(kit.to_double(problem.inputs()))
  return float(np.sqrt((np.asarray(dq) ** 2).mean()))


def run(kernel: Any, problem: Problem, **options: Any) -> dict[str, Any]:
  """The same names, from a kernel's module."""
  x, settings = problem.inputs(), problem.settings
  given = (x["q"], x["k"], x["v"], x["g"], x["state"])
  assert kernel.unsupported(*given[:4], settings) is None

  def both(*given):
    out, weight, state = kernel.forward(*given, settings, **options)
    normalized = None if weight is None else Normalized.of(out, weight, x["d_out"])
    gradients = kernel.backward(*given, normalized, x["d_out"], x["d_state"], settings, **options)
    return out, state, gradients

  return _named(*jax.jit(both)(*given))


def _named(out, state, gradients) -> dict[str, Any]:
  dq, dk, dv, dg, d_state = gradients
  named = {"out": out, "state.kv": state.kv, "state.z": state.z}
  named |= {"dq": dq, "dk": dk, "dv": dv, "dg": dg}
  named |= {"d_state.kv": d_state.kv, "d_state.z": d_state.z}
  return {name: x for name, x in named.items() if x is not None}


def check(kernel: Any, problem: Problem, **options: Any) -> None:
  """Every result of a kernel by name."""
  want, got = expected(problem), run(kernel, problem, **options)
  assert got.keys() == want.keys()
  least = {"dq": dq_terms(problem)} if problem.normalize and problem.harsh else {}
  for name, x in want.items():
    assert got[name].shape == x.shape, name
    kit.assert_close(name, got[name], x, problem.dtype, least=least.get(name, 0.0))
