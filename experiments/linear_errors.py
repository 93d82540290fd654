"""How exact linear attention is: every form of it against the recurrence in float64.

    python -m experiments.linear_errors
    python -m experiments.linear_errors --cases=decays,zeros --tokens=200 --out=few.json

For each kind of decay, input, number type and implementation: the relative root mean square error
of the output, the final state and every gradient, RMSE(error) / RMSE(truth), as
flash-linear-attention measures its own (it allows 0.005 for outputs and gradients of GLA). The
truth is made of the inputs as the number type holds them, so that what is counted is arithmetic and
not the rounding of inputs. Kernels run in the interpreters of their chips, and there on a few
tokens of the same kind. Writes experiments/results/linear_errors.json and prints a table.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from attention import linear_attention, linear_kernels
from attention.ops import linear
from experiments import files, flags, provenance
from experiments.flags import UserError, knob
from pallas_kernels import linear as contract
from pallas_kernels import linear_hopper, linear_tpu
from pallas_kernels.linear import Normalized

RESULTS = pathlib.Path(__file__).parent / "results" / "linear_errors.json"
N, M, h = 2, 32, 32
DECAYS = ("none", "head", "token", "channel")
INPUTS = ("q", "k", "v", "g", "kv", "z")
NAMES = ("out", "state", "z", "dq", "dk", "dv", "dg", "d_state", "d_z")
"""Of results and gradients; those of z, the normalizer's state, where there is one."""
ALLOWED_ELSEWHERE = 0.005
"""What flash-linear-attention's tests allow of its kernels, bfloat16, relative RMSE."""

Inputs = dict[str, Any]


def _ordinary(rng: np.random.Generator, x: Inputs, T: int) -> Inputs:
  return x


def _decays(rng: np.random.Generator, x: Inputs, T: int) -> Inputs:
  """One token in ten forgets everything; what follows it fades by a thousandth."""
  if x["g"] is not None:
    x["g"] = np.where(rng.random(x["g"].shape) < 0.1, -1e4, -1e-3)
  return x


def _zeros(rng: np.random.Generator, x: Inputs, T: int) -> Inputs:
  """Nothing fades over all tokens."""
  return x | {"g": None if x["g"] is None else np.zeros_like(x["g"])}


def _repeated(rng: np.random.Generator, x: Inputs, T: int) -> Inputs:
  return x | {"k": np.broadcast_to(x["k"][:, :1], x["k"].shape)}


def _scaled(factor: float, rng: np.random.Generator, x: Inputs, T: int) -> Inputs:
  return x | {"k": x["k"] * factor, "v": x["v"] * factor}


def _documents(rng: np.random.Generator, x: Inputs, T: int) -> Inputs:
  return x | {"ids": np.cumsum(rng.random((1, T)) < 1 / 37, axis=1).astype(np.int32)}


CASES: Final[Mapping[str, tuple[Callable[..., Inputs], int]]] = {
  "ordinary": (_ordinary, 1000),
  "decays": (_decays, 1000),
  "zeros": (_zeros, 65536),
  "repeated keys": (_repeated, 1000),
  "tiny": (functools.partial(_scaled, 1e-12), 1000),
  "huge": (functools.partial(_scaled, 1e12), 1000),
  "documents": (_documents, 1000),
}
"""Name -> (what it makes of ordinary inputs, how many tokens)."""

IMPLEMENTATIONS: Final[Mapping[str, tuple[str, ...]]] = {
  "reference": ("float32",),
  "chunked": ("float32", "bfloat16"),
  "tpu": ("float32", "bfloat16"),
  "hopper": ("float32", "bfloat16"),
}
"""Name -> the number types that it takes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """The command line."""

  cases: str = knob("all", f"Inputs, with commas: {', '.join(CASES)}.")
  implementations: str = knob("all", f"With commas: {', '.join(IMPLEMENTATIONS)}.")
  tokens: int = knob(0, "At most so many tokens a case; 0 is as many as it has.", "[0, inf)")
  interpreted: int = knob(150, "Tokens of kernels, which are interpreted.", "[1, 4096]")
  out: str = knob("", "Results, JSON; empty is experiments/results/linear_errors.json.")


def make(case: str, decay: str, normalize: bool, dtype: str, tokens: int) -> Inputs:
  """The inputs of a case, as `dtype` holds them, and the gradients that come back."""
  change, T = CASES[case]
  T = min(T, tokens)
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape)
  x: Inputs = {"q": normal(1, T, N, M) / M, "k": normal(1, T, N, M), "v": normal(1, T, N, h)}
  if normalize:
    x |= {name: np.abs(x[name]) for name in "qk"}
  shape = {"none": None, "head": (N,), "token": (1, T, N), "channel": (1, T, N, M)}[decay]
  x["g"] = None if shape is None else -np.log1p(np.exp(normal(*shape))) / 16
  x["kv"], x["z"] = normal(1, N, M, h), np.abs(normal(1, N, M))
  x["d_out"], x["d_kv"], x["ids"] = normal(1, T, N, h), normal(1, N, M, h), None
  x["d_z"] = normal(1, N, M)
  x = change(rng, x, T)
  narrow = {name: jnp.asarray(x[name], dtype) for name in ("q", "k", "v", "d_out")}
  wide = ("g", "kv", "z", "d_kv", "d_z")
  return x | narrow | {n: x[n] if x[n] is None else jnp.asarray(x[n], jnp.float32) for n in wide}


def by_op(x: Inputs, normalize: bool, implementation: str) -> dict[str, Any]:
  """Every result by name, from `linear_attention` and automatic differentiation."""

  attend: Any = linear_attention  # a pair, because a state is asked for

  def run(q, k, v, g, kv, z):
    out, state = attend(
      q, k, v, log_decay=g, normalize=normalize, initial_state=linear.State(kv, z),
      return_state=True, segment_ids=x["ids"], implementation=implementation,
    )  # fmt: skip
    return out, state.kv, state.z

  def both(*given):
    results, pull = jax.vjp(run, *given)
    return results, pull((x["d_out"].astype(results[0].dtype), x["d_kv"], x["d_z"]))

  results, gradients = jax.jit(both)(*(x[name] for name in INPUTS))
  return _named((*results, *gradients), normalize)


def _named(values: Sequence[Any], normalize: bool) -> dict[str, Any]:
  named = zip(NAMES, values, strict=True)
  return {name: value for name, value in named if normalize or name not in ("z", "d_z")}


def truth(x: Inputs, normalize: bool) -> dict[str, np.ndarray]:
  """The same from the recurrence in float64."""
  with jax.enable_x64(True):
    wide = {
      name: jnp.asarray(np.asarray(value, np.float64))
      if value is not None and jnp.issubdtype(value.dtype, jnp.floating)
      else value
      for name, value in x.items()
    }
    results = by_op(wide, normalize, "reference")
    return {name: np.asarray(value) for name, value in results.items() if value is not None}


def by_kernel(x: Inputs, normalize: bool, chip: str) -> dict[str, Any]:
  """The same from a chip's kernel, interpreted, called as the op calls it."""
  kernel: ModuleType = {"tpu": linear_tpu, "hopper": linear_hopper}[chip]
  options = {"on_chip": False} if chip == "hopper" else {}
  interpret = {
    "tpu": lambda: pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()),
    "hopper": lambda: plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
  }[chip]()
  after = contract.State(x["d_kv"], x["d_z"] if normalize else None)

  def lowered(q, k, v, g, kv, z):
    state = linear.State(kv, z)
    call = linear.describe(
      q, k, v, log_decay=g, normalize=normalize, initial_state=state, segment_ids=x["ids"]
    )
    return linear_kernels.lower(chip, call)

  def both(*given):
    static = lowered(*given)[0]
    operands, pull = jax.vjp(lambda *given: lowered(*given)[1], *given)
    out, weight, end = kernel.forward(*operands, static.settings, **options)
    normalized = None if weight is None else Normalized.of(out, weight, x["d_out"])
    back = kernel.backward(*operands, normalized, x["d_out"], after, static.settings, **options)
    like = jax.tree.map(lambda d, x: d.astype(x.dtype), linear_kernels.Operands(*back), operands)
    return (out, end.kv, end.z), pull(like)

  with interpret:
    results, gradients = jax.jit(both)(*(x[name] for name in INPUTS))
  return _named((*results, *gradients), normalize)


def relative(actual: Any, expected: np.ndarray) -> float:
  """RMSE(error) / RMSE(truth); 0 where both are 0, inf where something is not finite."""
  actual = np.asarray(actual, np.float64)
  if not np.isfinite(actual).all():
    return float("inf")
  size = float(np.sqrt((expected**2).mean()))
  error = float(np.sqrt(((actual - expected) ** 2).mean()))
  return error / size if size else error


def rows(options: Options) -> list[dict[str, Any]]:
  """A row for each decay, normalization, case, implementation and number type."""
  cases = _chosen("--cases", options.cases, CASES)
  implementations = _chosen("--implementations", options.implementations, IMPLEMENTATIONS)
  found = []
  for case in cases:
    for decay, normalize in [*((decay, False) for decay in DECAYS), ("none", True)]:
      found += _of_one(case, decay, normalize, implementations, options)
    print(f"{case}: done", file=sys.stderr, flush=True)
  return found


def _of_one(
  case: str, decay: str, normalize: bool, implementations: Sequence[str], options: Options
) -> list[dict[str, Any]]:
  truths: dict[tuple[str, int], dict[str, np.ndarray]] = {}
  found = []
  for implementation in implementations:
    kernel = implementation in ("tpu", "hopper")
    most = options.interpreted if kernel else options.tokens or sys.maxsize
    for dtype in IMPLEMENTATIONS[implementation]:
      x = make(case, decay, normalize, dtype, most)
      T = x["q"].shape[1]
      if (dtype, T) not in truths:
        truths[dtype, T] = truth(x, normalize)
      actual = (by_kernel if kernel else by_op)(x, normalize, implementation)
      errors = {name: relative(actual[name], want) for name, want in truths[dtype, T].items()}
      what = {"case": case, "decay": decay, "normalize": normalize, "dtype": dtype}
      found.append(what | {"implementation": implementation, "tokens": T, "errors": errors})
  return found


def _chosen(flag: str, text: str, known: Mapping[str, Any]) -> list[str]:
  if text == "all":
    return list(known)
  names = [name.strip() for name in text.split(",")]
  for name in names:
    if name not in known:
      raise UserError(flags.unknown(flag, name, known))
  return names


def table(results: Sequence[Mapping[str, Any]]) -> str:
  """The worst name of each row: for each case a line, for each implementation a column."""
  columns = list(dict.fromkeys((r["implementation"], r["dtype"]) for r in results))
  heads = [f"{name} {dtype}" for name, dtype in columns]
  lines = [f"{'case':<15}{'decay':<19}" + "".join(f"{head:>24}" for head in heads)]
  groups: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
  for r in results:
    decay = f"{r['decay']}{', normalized' if r['normalize'] else ''}"
    name = max(r["errors"], key=lambda name: r["errors"][name])
    cell = f"{r['errors'][name]:.1e} {name}"
    groups.setdefault((r["case"], decay), {})[r["implementation"], r["dtype"]] = cell
  for (case, decay), cells in groups.items():
    texts = (f"{cells.get(column, ''):>24}" for column in columns)
    lines.append(f"{case:<15}{decay:<19}" + "".join(texts))
  return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
  """Measures, writes, prints."""
  options = flags.parse(argv, Options(), doc=__doc__ or "")
  with flags.blame_user():
    flags.check_bounds(options)
  path = pathlib.Path(options.out or RESULTS)
  provenance.prepare(path)
  jax.config.update("jax_platforms", "cpu")
  results = {
    "environment": provenance.environment(("jax", "jaxlib", "numpy")),
    "shape": {"B": 1, "N": N, "M": M, "h": h},
    "fla_allows": ALLOWED_ELSEWHERE,
    "rows": rows(options),
  }
  files.write_results(path, results)
  print(table(results["rows"]))
  return 0


if __name__ == "__main__":
  flags.run_main(main)
