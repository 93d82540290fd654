"""What is measured on a chip, as data: masks, shapes, contenders, and in which order.

Softmax attention first; then linear attention, at the shapes of flash-linear-attention's registry
and with the bytes that must move, for they and not operations bound it; then hard-max attention.

The table is FlashAttention-3's (Shah et al. 2024, section 4.1, https://arxiv.org/abs/2407.08608):
16k tokens in all, B T, and 2048 columns in all, N H. Sliding windows and packed documents follow,
both causal. Operations are counted as there, 2 B N T S (H + h) forward and 2.5 times that backward,
half of it where causal; of a window and of documents only the pairs that may attend are counted.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Final

import jax
import numpy as np

from attention import masks
from attention.masks import Mask

K = 1024
BACKWARD = 2.5  # operations of the backward pass, of those of the forward pass


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
  """Of q, k and v."""

  B: int
  T: int
  N: int
  H: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case(Shape):
  """One shape under one mask."""

  mechanism: ClassVar[str] = "softmax"
  mask: str
  """"full", "causal", "window W": the last W tokens, or "documents M": of mean length M, packed."""

  @property
  def name(self) -> str:
    """How results and targets write it."""
    return f"{self.mask} H={self.H} T={self.T}"

  @property
  def family(self) -> str:
    """The mask without its size."""
    return self.mask.split()[0]

  @property
  def size(self) -> int:
    """The window, or the mean length of a document."""
    return int(self.mask.split()[1])

  def documents(self) -> np.ndarray:
    """The number of the document that each token is of; the same in every process."""
    if self.family != "documents":
      return np.zeros(self.T, np.int32)
    draw = np.random.default_rng(self.size)
    lengths = np.maximum(1, draw.exponential(self.size, 8 + 4 * self.T // self.size)).astype(int)
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[: self.T]

  def attends(self, rows: np.ndarray) -> np.ndarray:
    """Which keys some queries may attend to, bool `rows T`."""
    behind = rows[:, None] - np.arange(self.T)[None]
    if self.family == "full":
      return np.full_like(behind, True, dtype=bool)
    if self.family == "window":
      return (behind >= 0) & (behind < self.size)
    ids = self.documents()
    return (behind >= 0) & (ids[rows][:, None] == ids[None])

  def lowered(self, ids: jax.Array | None) -> Mask:
    """The mask as ours, of the documents' numbers `1 T` where there are any."""
    if ids is not None:
      return masks.causal() & masks.segments(ids)
    if self.family == "full":
      return masks.everything()
    if self.family == "window":
      return masks.sliding_window(self.size - 1)
    return masks.causal()

  def pairs(self) -> float:
    """How many (query, key) count, of all batch rows and one head."""
    T = self.T
    if self.family == "full":
      each = float(T * T)
    elif self.family == "causal":
      each = T * T / 2
    elif self.family == "window":
      each = float(np.minimum(np.arange(T) + 1, self.size).sum())
    else:
      lengths = np.unique(self.documents(), return_counts=True)[1].astype(np.float64)
      each = float((lengths * (lengths + 1) / 2).sum())
    return self.B * each

  def operations(self, kind: str) -> float:
    """Of "forward", "backward" or both."""
    forward = 4.0 * self.N * self.H * self.pairs()
    shares = {"forward": 1.0, "backward": BACKWARD, "forward+backward": 1.0 + BACKWARD}
    return forward * shares[kind]

  def rate(self, kind: str, seconds: float) -> dict[str, float]:
    """What was done in a second, by the name of its unit."""
    return {"tflops": self.operations(kind) / seconds / 1e12}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearCase(Shape):
  """One shape of linear attention; keys and values are of one width."""

  mechanism: ClassVar[str] = "linear"
  decay: str
  """"token" or "channel"."""

  @property
  def name(self) -> str:
    """How results and targets write it."""
    return f"{self.decay} B={self.B} T={self.T} N={self.N} H={self.H}"

  @property
  def family(self) -> str:
    """What contenders are chosen by."""
    return self.decay

  def moved(self, kind: str) -> float:
    """Bytes of every input and output once, 16 bits wide, decays 32; both passes are a sum. Of a
    "step", one token more, also its state there and back.
    """
    if kind == "forward+backward":
      return self.moved("forward") + self.moved("backward")
    arrays, decays = (7, 2) if kind == "backward" else (4, 1)
    tokens, state = (1, 2 * 4 * self.H**2) if kind == "step" else (self.T, 0)
    width = self.H if self.decay == "channel" else 1
    each = 2 * arrays * self.H + 4 * decays * width + state
    return float(self.B * tokens * self.N * each)

  def rate(self, kind: str, seconds: float) -> dict[str, float]:
    """Least bytes in a second, which no memory exceeds."""
    return {"terabytes": self.moved(kind) / seconds / 1e12}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HardCase(Shape):
  """One shape of causal hard-max attention; keys and values are of one width."""

  mechanism: ClassVar[str] = "hardmax"

  @property
  def name(self) -> str:
    """How results and targets write it."""
    return f"H={self.H} T={self.T}"

  @property
  def family(self) -> str:
    """What contenders are chosen by: only heads of width 2 have hulls, and XLA's tiles would take
    minutes from 128k tokens on.
    """
    if self.H != 2:
      return "wide"
    return "planar" if self.T < 128 * K else "planar, long"

  def rate(self, kind: str, seconds: float) -> dict[str, float]:
    """Pairs of a query and a key that it may read in a second, whoever looks at them or not."""
    del kind
    pairs = self.B * self.N * self.T * (self.T + 1) / 2
    return {"terapairs": pairs / seconds / 1e12}


AnyCase = Case | LinearCase | HardCase


def case_row(case: AnyCase) -> dict[str, object]:
  """What the results keep of a case."""
  return {"case": case.name, **dataclasses.asdict(case)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChipSuite:
  """One benchmark on a chip: q, k and v are standard normal, a key head for each query head."""

  device: str
  """The platform that it needs, "gpu" or "cpu"."""
  ours: str
  """Which implementation of the op is ours."""
  dtype: str
  rounds: int
  least: float
  """Seconds that one measurement is aimed at; half of it is what it lasts at the worst."""
  together: int
  """Cases whose programs are compiled side by side, and then timed."""
  checks: tuple[str, ...] | None
  """Which checks of `checks.py`; None is all."""
  contenders: Mapping[str, tuple[str, ...]]
  """Family of cases -> who takes part, ours left out."""
  cases: tuple[Case, ...] | tuple[LinearCase, ...] | tuple[HardCase, ...]
  """The most telling first: time may run out."""

  @property
  def mechanism(self) -> str:
    """ "softmax", "linear" or "hardmax"."""
    return self.cases[0].mechanism


def _case(mask: str, H: int, T: int) -> Case:
  return Case(mask=mask, B=16 * K // T, T=T, N=2048 // H, H=H)


def _gpu_cases() -> tuple[Case, ...]:
  """The targets' cases, then the rest of 16k, then shorter ones."""
  partial = ("window 512", "window 1024", "window 4096", "documents 1024", "documents 4096")
  first = [_case("causal", H, 16 * K) for H in (128, 64)]
  first += [_case(mask, H, 16 * K) for H in (128, 64) for mask in partial]
  table = [
    _case(mask, H, T * K // 2)
    for T in (32, 8, 2, 16, 4, 1)
    for H in (128, 64, 256)
    for mask in ("causal", "full")
  ]
  return tuple(dict.fromkeys([*first, *table]))


_DENSE = ("jax cuDNN", "tokamax", "torch efficient", "torch cuDNN")

# The shapes of flash-linear-attention's registry of benchmarks.
FLA: Final = tuple(
  LinearCase(decay=decay, B=B, T=T, N=N, H=H)
  for B, T, N, H in (
    (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 4096, 64, 128), (8, 2048, 32, 256)
  )
  for decay in ("token", "channel")
)  # fmt: skip

CHIP_SUITES: Final[Mapping[str, ChipSuite]] = {
  "gpu": ChipSuite(
    device="gpu",
    ours="hopper",
    dtype="bfloat16",
    rounds=5,
    least=0.04,
    together=4,
    checks=None,
    contenders={
      "full": ("jax cuDNN", "jax mgpu f16", "tokamax", "torch flash", "torch cuDNN"),
      "causal": ("jax cuDNN", "jax mgpu f16", "tokamax", "torch flash", "torch cuDNN"),
      "window": _DENSE,
      "documents": _DENSE,
    },
    cases=_gpu_cases(),
  ),
  "gpu-linear": ChipSuite(
    device="gpu",
    ours="hopper",
    dtype="bfloat16",
    rounds=5,
    least=0.04,
    together=2,
    checks=None,
    contenders=dict.fromkeys(("token", "channel"), ("fla", "jax-linear-attention", "chunked")),
    cases=FLA,
  ),
  "gpu-hardmax": ChipSuite(
    device="gpu",
    ours="hopper",
    dtype="float32",
    rounds=5,
    least=0.04,
    together=2,
    checks=None,
    contenders={"planar": ("bulk", "tiled"), "planar, long": ("bulk",), "wide": ("tiled",)},
    cases=tuple(
      HardCase(B=1, T=T * K, N=8, H=H)
      for H, lengths in ((2, (16, 64, 128, 256, 4, 32)), (8, (16, 64)))
      for T in lengths
    ),
  ),
  "gpu-hardmax-toy": ChipSuite(
    device="cpu",
    ours="tiled",
    dtype="float32",
    rounds=2,
    least=0.002,
    together=2,
    checks=("causal", "token by token"),
    contenders={"planar": ("bulk",), "wide": ("reference",)},
    cases=(HardCase(B=2, T=128, N=2, H=2), HardCase(B=1, T=96, N=2, H=4)),
  ),
  "gpu-linear-toy": ChipSuite(
    device="cpu",
    ours="chunked",
    dtype="float32",
    rounds=2,
    least=0.002,
    together=2,
    checks=("token, odd T", "one token more"),
    contenders={"token": ("recurrence", "torch recurrence", "fla"), "channel": ("recurrence",)},
    cases=(
      LinearCase(decay="token", B=1, T=96, N=2, H=16),
      LinearCase(decay="channel", B=2, T=64, N=2, H=8),
    ),
  ),
  "gpu-toy": ChipSuite(
    device="cpu",
    ours="tiled",
    dtype="float32",
    rounds=2,
    least=0.002,
    together=3,
    checks=("one query", "documents, more keys than queries"),
    contenders={
      "causal": ("jax XLA", "tokamax", "torch math"),
      "documents": ("jax XLA", "torch math"),
    },
    cases=(
      Case(mask="causal", B=1, T=128, N=2, H=16),
      Case(mask="documents 32", B=2, T=128, N=2, H=16),
    ),
  ),
}
