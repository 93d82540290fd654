"""Whether an implementation of hard-max attention is right on this chip: which key a query reads,
how many tie, the output and the values' gradient; and a hull that decodes.

Keys are integers, whose scores are exact and often tie, or normal, whose scores every form rounds
alike: which key is read must not differ at all. The truth is `reference`, and a scan of all keys
where tokens come one by one. Each program runs twice and must give the same bits.

    python -m experiments.benchmarks.hardmax_checks IMPLEMENTATION NAME...
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from attention import hull, masks
from attention.masks import Mask
from attention.ops import hardmax
from experiments.benchmarks import checks

# What an error may be, as a share of the largest true value: means and gradients are sums.
SHARE: Final = {"out": 1e-5, "d v": 1e-5}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
  """One call and its gradient, or tokens one by one."""

  name: str
  B: int = 2
  T: int = 512
  S: int = 512
  N: int = 4
  K: int = 4
  H: int = 2
  mask: Callable[[], Mask] = masks.causal
  ties: str = "average"
  normal: bool = False
  step: bool = False

  def share(self, name: str) -> float:
    """What a quantity's error may be beyond twice that of XLA, of its largest true value."""
    return SHARE.get(name, 0.0)


CHECKS: Final[tuple[Check, ...]] = (
  Check(name="causal"),
  Check(name="causal, the last of ties", ties="latest"),
  Check(name="causal, normal", normal=True, T=1000, S=1000),
  Check(name="full", mask=masks.everything),
  Check(name="odd T and S", T=333, S=517, mask=masks.everything),
  Check(name="one query", T=1, S=777, mask=lambda: masks.causal(776)),
  Check(name="rows that see nothing", T=456, S=200, mask=lambda: masks.causal(-130)),
  Check(name="window", T=1000, S=1000, mask=lambda: masks.sliding_window(99)),
  Check(name="queries share keys", N=8, K=2),
  Check(name="width 1", H=1),
  Check(name="width 3", H=3),
  Check(name="width 8", H=8),
  Check(name="width 8, normal", H=8, normal=True),
  Check(name="long", B=1, N=2, K=2, T=8192, S=8192, normal=True),
  Check(name="token by token", step=True, B=1, T=200, S=200, N=4, K=2),
  Check(name="token by token, the last of ties", step=True, B=1, T=200, S=200, ties="latest"),
)  # fmt: skip


def operands(check: Check) -> dict[str, jax.Array]:
  """q, k, v and the output's cotangent."""
  draw = iter(jax.random.split(jax.random.key(0), 4))
  shapes = {"q": (check.T, check.N, check.H), "k": (check.S, check.K, check.H),
            "v": (check.S, check.K, 8), "d": (check.T, check.N, 8)}  # fmt: skip
  arrays = {name: jax.random.normal(next(draw), (check.B, *x)) for name, x in shapes.items()}
  if not check.normal:
    arrays |= {name: jnp.round(3 * arrays[name]) for name in "qk"}
  if check.step:  # a hull counts all ties where float32 holds the slope of the query
    arrays["q"] = arrays["q"].at[..., 1].set(jnp.sign(arrays["q"][..., 1]))
  return arrays


def program(check: Check, implementation: str) -> Callable[..., dict[str, jax.Array]]:
  """operands -> results by name."""
  if check.step:
    return functools.partial(_decode, check, implementation)

  def run(arrays):
    q, k, v, d = (arrays[name] for name in "qkvd")

    def attend(v):
      out: Any = hardmax.hardmax_attention(
        q, k, v, check.mask(), ties=check.ties, implementation=implementation, return_residual=True
      )
      return out

    out, pull, winners = jax.vjp(attend, v, has_aux=True)
    return {"out": out, "d v": pull(d)[0]} | winners._asdict()

  return run


def _decode(check: Check, form: str, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """All tokens, one after the other; `form` is the hull's, or "scan"."""
  q, k, v = (arrays[name].swapaxes(0, 1) for name in "qkv")
  sizes = {"num_heads": check.N, "num_kv_heads": check.K, "value_dim": v.shape[-1]}
  library: Any = hardmax if form == "scan" else hull
  state = library.init_state(
    check.B, head_dim=2, max_length=check.T, dtype=jnp.float32, ties=check.ties, **sizes
  )
  options = {"ties": check.ties} if form == "scan" else {"implementation": form}
  return {"out": jax.lax.scan(lambda s, x: library.step(s, *x, **options), state, (q, k, v))[1]}


def compiled(check: Check, implementation: str) -> dict[str, Any]:
  """The programs and what they are called with, not yet run: the truth, XLA's answer and ours."""
  arrays = operands(check)
  names = {"truth": "reference", "plain": "tiled", "ours": implementation}
  if check.step:
    ours = "hopper" if implementation == "hopper" else "loops"
    names = {"truth": "scan", "plain": "scan", "ours": ours}
  return {
    who: (jax.jit(program(check, name)).lower(arrays).compile(), (arrays,))
    for who, name in names.items()
  }


run = functools.partial(checks.run, known=CHECKS, module=__name__)


def main(implementation: str, *names: str) -> None:
  """The checks of these names."""
  checks.serve(implementation, names, CHECKS, compiled)


if __name__ == "__main__":
  main(*sys.argv[1:])
