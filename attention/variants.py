"""Every attention mechanism by name: flags, tests, benchmarks and tables derive from this dict.

    parse("linear,linear,softmax:window=128")     the layers of a hybrid, as bound mechanisms
    make_decoder(config, rngs=nnx.Rngs(0))        a model with `config.pattern`
    table()                                       the rows of the README

A new mechanism is an entry of `VARIANTS`, beside its file in `attention/ops` and its test.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from attention.dispatch import suggest
from attention.feature_maps import FeatureMap, cosformer, favor_of_seed
from attention.modules.based import BasedAttention
from attention.modules.config import DecoderConfig
from attention.modules.decoder import Decoder, Rngs
from attention.modules.gated import GatedLinearAttention
from attention.modules.griffin import RecurrentBlock
from attention.modules.hedgehog import HedgehogAttention
from attention.modules.hgrn import HGRN2
from attention.modules.mixer import Attention
from attention.modules.retention import LightningAttention, Retention, retention_decay
from attention.modules.ssd import Mamba2
from attention.ops import hardmax, linear, linear_scan, softmax, stochastic
from attention.types import AttentionFn, Cost, State

Option = bool | int | float | str | None


def no_inputs(key: jax.Array, B: int, T: int, N: int, K: int, H: int, h: int) -> dict[str, Any]:
  """The example inputs of a mechanism that reads q, k and v alone: {}."""
  del key, B, T, N, K, H, h
  return {}


def decay_inputs(key: jax.Array, B: int, T: int, N: int, K: int, H: int, h: int) -> dict[str, Any]:
  """A log decay per token, head and channel, as a gated mixer makes it."""
  del K, h
  return {"log_decay": jax.nn.log_sigmoid(jax.random.normal(key, (B, T, N, H), jnp.float32)) / 4}


def head_decay_inputs(
  key: jax.Array, B: int, T: int, N: int, K: int, H: int, h: int
) -> dict[str, Any]:
  """A log decay per token and head: RetNet's rates, up to ten times as fast for some tokens."""
  del K, H, h
  faster = jax.random.uniform(key, (B, T, N), jnp.float32, 1.0, 10.0)
  return {"log_decay": retention_decay(N)[None, None] * faster}


def noise_inputs(key: jax.Array, B: int, T: int, N: int, K: int, H: int, h: int) -> dict[str, Any]:
  """A uniform number per token and head, by which it draws."""
  del K, H, h
  return {"noise": jax.random.uniform(key, (B, T, N), jnp.float32)}


def _featured(make: Callable[..., FeatureMap], *names: str) -> dict[str, Any]:
  """`linear`'s functions, normalized, with the feature map make(head_dim, **options).

  `names` are the options that make it.
  """

  def using(function, width):
    def call(*args, **options):
      made = make(width(*args, **options), **{name: options.pop(name) for name in names})
      return function(*args, feature_map=made, normalize=True, **options)

    return functools.wraps(function)(call)

  width_of_query = lambda q, *_, **__: q.shape[-1]
  width_after_state = lambda state, q, *_, **__: q.shape[-1]
  return {
    "attend": using(linear.attend, width_of_query),
    "reference": using(linear.reference, width_of_query),
    "init_state": using(linear.init_state, lambda batch, *, head_dim, **_: head_dim),
    "prefill": using(linear.prefill, width_after_state),
    "step": using(linear.step, width_after_state),
    "cost": using(linear.cost, lambda B, T, S, N, K, H, h, **_: H),
  }


def _performer(head_dim: int, *, num_features: int | None, seed: int) -> FeatureMap:
  return favor_of_seed(seed, head_dim, 2 * head_dim if num_features is None else num_features)


def _cosformer(head_dim: int, *, horizon: int) -> FeatureMap:
  del head_dim
  return cosformer(horizon)


_LINEAR: Final[Mapping[str, Any]] = {
  "attend": linear.attend,
  "reference": linear.reference,
  "init_state": linear.init_state,
  "prefill": linear.prefill,
  "step": linear.step,
  "cost": linear.cost,
  "complexity": "O(T) time and memory, O(1) state",
}
_DECAYED: Final[Mapping[str, Option]] = {"feature_map": "identity", "normalize": False}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Variant:
  """One mechanism, in every form that this library has of it."""

  attend: AttentionFn
  """(q [B T N H], k [B S K H], v [B S K h], *, is_causal=True, segment_ids=None [B T],
  implementation=None, ...) -> out [B T N h]: the parallel form, which trains."""
  reference: Callable[..., Any]
  """The same, float32, small and slow."""
  init_state: Callable[..., State]
  """(batch, *, num_heads, num_kv_heads, head_dim, value_dim, max_length, dtype, ...) -> state."""
  prefill: Callable[..., tuple[State, jax.Array]]
  """(state, q, k, v, *, lengths [B], ...) -> (state, out)."""
  step: Callable[..., tuple[State, jax.Array]]
  """(state, q [B N H], k [B K H], v [B K h], ...) -> (state, out [B N h])."""
  cost: Callable[..., Cost]
  """(B, T, S, N, K, H, h, ...) -> flops, bytes, state bytes."""
  mixer: type[Attention] = Attention
  """The module that owns what it learns."""
  rotary: bool = False
  """Whether mixers turn queries and keys by their positions."""
  elementwise: bool = False
  """Whether q, k and v are of one width and meet channel by channel, without products between."""
  options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
  """Keyword arguments of every function above, with their defaults."""
  example_inputs: Callable[..., dict[str, Any]] = no_inputs
  """(key, B, T, N, K, H, h) -> what it reads beside q, k and v, for tests and benchmarks."""
  summary: str
  """What it is, in a line."""
  complexity: str
  """What it costs, in a line: time over T tokens, decoding state."""
  source: str
  """The paper, as a Markdown link."""


VARIANTS: Final[Mapping[str, Variant]] = {
  "softmax": Variant(
    attend=softmax.attend,
    reference=softmax.reference,
    init_state=softmax.init_state,
    prefill=softmax.prefill,
    step=softmax.step,
    cost=softmax.cost,
    rotary=True,
    options={"window": None, "logit_cap": None},
    summary="Softmax attention, optionally over the last `window` tokens and with capped logits.",
    complexity="O(T²) time, O(T) memory and state; O(T W) time and O(W) state with a window",
    source="[Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)",
  ),
  "linear": Variant(
    **_LINEAR,
    options={"feature_map": "elu_plus_one", "normalize": True},
    summary="Linear attention: a feature map in place of exp, so that the past is one matrix.",
    source="[Katharopoulos et al. 2020](https://arxiv.org/abs/2006.16236)",
  ),
  "performer": Variant(
    **{**_LINEAR, **_featured(_performer, "num_features", "seed")},
    options={"num_features": None, "seed": 0},
    summary="Linear attention by positive random features, which are softmax's kernel on average.",
    source="[Choromanski et al. 2021](https://arxiv.org/abs/2009.14794)",
  ),
  "taylor": Variant(
    **_LINEAR,
    mixer=BasedAttention,
    options={"feature_map": "taylor", "normalize": True},
    summary="Based's linear attention: softmax's kernel to second order, of 16 channels a head.",
    source="[Arora et al. 2024](https://arxiv.org/abs/2402.18668)",
  ),
  "cosformer": Variant(
    **{**_LINEAR, **_featured(_cosformer, "horizon")},
    options={"horizon": 65536},
    summary="Linear attention by ReLU features, weighed by a cosine of the distance.",
    source="[Qin et al. 2022](https://arxiv.org/abs/2202.08791)",
  ),
  "hedgehog": Variant(
    **_LINEAR,
    mixer=HedgehogAttention,
    options={"feature_map": "hedgehog", "normalize": True},
    summary="Linear attention whose feature map, a pair of softmaxes, is learned.",
    source="[Zhang et al. 2024](https://arxiv.org/abs/2402.04347)",
  ),
  "retnet": Variant(
    **_LINEAR,
    mixer=Retention,
    rotary=True,
    options=_DECAYED,
    example_inputs=head_decay_inputs,
    summary="Retention: heads that forget at constant rates, each its own, with rotated keys.",
    source="[Sun et al. 2023](https://arxiv.org/abs/2307.08621)",
  ),
  "lightning": Variant(
    **_LINEAR,
    mixer=LightningAttention,
    options=_DECAYED,
    example_inputs=head_decay_inputs,
    summary="Linear attention with a constant slope per head, less steep in deeper layers.",
    source="[Qin et al. 2024](https://arxiv.org/abs/2401.04658)",
  ),
  "mamba2": Variant(
    **_LINEAR,
    mixer=Mamba2,
    options=_DECAYED,
    example_inputs=head_decay_inputs,
    summary="State-space duality: heads forget by a step size; convolutions, a skip, a gate.",
    source="[Dao and Gu 2024](https://arxiv.org/abs/2405.21060)",
  ),
  "gated_linear": Variant(
    **_LINEAR,
    mixer=GatedLinearAttention,
    options=_DECAYED,
    example_inputs=decay_inputs,
    summary="Linear attention whose channels forget at a rate that the input sets.",
    source="[Yang et al. 2023](https://arxiv.org/abs/2312.06635)",
  ),
  "hgrn2": Variant(
    **_LINEAR,
    mixer=HGRN2,
    options=_DECAYED,
    example_inputs=decay_inputs,
    summary="A gated recurrence with a matrix for its state; a channel writes what it forgets.",
    source="[Qin et al. 2024](https://arxiv.org/abs/2404.07904)",
  ),
  "rglru": Variant(
    attend=linear_scan.attend,
    reference=linear_scan.reference,
    init_state=linear_scan.init_state,
    prefill=linear_scan.prefill,
    step=linear_scan.step,
    cost=linear_scan.cost,
    mixer=RecurrentBlock,
    elementwise=True,
    example_inputs=decay_inputs,
    summary="Griffin's recurrent block: every channel is a gated average of its past.",
    complexity="O(T) time and memory, O(1) state, a number per channel",
    source="[De et al. 2024](https://arxiv.org/abs/2402.19427)",
  ),
  "hardmax": Variant(
    attend=hardmax.attend,
    reference=hardmax.reference,
    init_state=hardmax.init_state,
    prefill=hardmax.prefill,
    step=hardmax.step,
    cost=hardmax.cost,
    options={"ties": "average", "top_k": None, "scale": None},
    summary="Hard-max attention: the value of the best key; with `top_k`, a softmax over the best.",
    complexity="O(T²) time, O(T) memory and state; O(T log² T) time where heads are of width 2",
    source="[Merrill et al. 2022](https://arxiv.org/abs/2106.16213)",
  ),
  "stochastic": Variant(
    attend=stochastic.attend,
    reference=stochastic.reference,
    init_state=stochastic.init_state,
    prefill=stochastic.prefill,
    step=stochastic.step,
    cost=stochastic.cost,
    options={"temperature": 1.0, "scale": None},
    example_inputs=noise_inputs,
    summary="Hard attention to a key drawn from the softmax; without noise its mean, softmax's.",
    complexity="O(T²) time, O(T) memory and state; one value read for each query",
    source="[Xu et al. 2015](https://arxiv.org/abs/1502.03044)",
  ),
}
"""Name -> mechanism, in the order of every table."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
  """A mechanism with its options bound: what a mixer runs. Hashable, and compared by value.

  The methods are those of `Variant`.
  """

  name: str
  options: Mapping[str, Option]
  """All of them, defaults included."""
  implementation: str | None = None
  """Of `attend`; None chooses."""

  def __hash__(self) -> int:
    return hash((self.name, tuple(sorted(self.options.items())), self.implementation))

  @property
  def variant(self) -> Variant:
    """The entry of `VARIANTS`."""
    return VARIANTS[self.name]

  @property
  def mixer(self) -> type[Attention]:
    """The module that owns what the mechanism learns."""
    return self.variant.mixer

  @property
  def rotary(self) -> bool:
    """Whether mixers turn queries and keys by their positions."""
    return self.variant.rotary

  def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, **inputs: Any) -> jax.Array:
    """Attention over whole sequences; `is_causal` is True by default."""
    implementation = self.implementation
    return self.variant.attend(q, k, v, implementation=implementation, **inputs, **self.options)

  def init_state(self, batch: int, **sizes: Any) -> State:
    """The decoding state of no token."""
    return self.variant.init_state(batch, **sizes, **self.options)

  def prefill(self, state: State, q: Any, k: Any, v: Any, **inputs: Any) -> tuple[State, jax.Array]:
    """Appends many tokens."""
    return self.variant.prefill(state, q, k, v, **inputs, **self.options)

  def step(self, state: State, q: Any, k: Any, v: Any, **inputs: Any) -> tuple[State, jax.Array]:
    """Appends one token."""
    return self.variant.step(state, q, k, v, **inputs, **self.options)

  def cost(self, B: int, T: int, S: int, N: int, K: int, H: int, h: int) -> Cost:
    """What one call costs."""
    return self.variant.cost(B, T, S, N, K, H, h, **self.options)


def make_layer(name: str, *, implementation: str | None = None, **options: Option) -> Layer:
  """The mechanism `name` with these options, and defaults for the others."""
  if name not in VARIANTS:
    raise ValueError(f"There is no attention mechanism {name!r}; {suggest(name, VARIANTS)}")
  defaults = VARIANTS[name].options
  for option in options:
    if option not in defaults:
      choices = (*defaults, "implementation")
      raise ValueError(f"{name!r} has no option {option!r}; {suggest(option, choices)}")
  return Layer(name, {**defaults, **options}, implementation)


def parse(spec: str) -> tuple[Layer, ...]:
  """The layers that a pattern names: mechanisms with commas between, each with `:option=value`s.

      parse("linear:feature_map=relu,softmax:window=128")

  Raises:
    ValueError: a name, an option or a value is not known, with the nearest one that is.
  """
  return tuple(_parse_layer(part.strip()) for part in spec.split(","))


def make_decoder(config: DecoderConfig, *, rngs: Rngs) -> Decoder:
  """A model whose layers are `config.pattern`, on the mesh in context if there is one."""
  return Decoder(config, parse(config.pattern), rngs=rngs)


class Row(NamedTuple):
  """A row of the README's table."""

  name: str
  what: str
  cost: str
  source: str


def table() -> list[Row]:
  """What there is: a row for each mechanism."""
  return [Row(name, v.summary, v.complexity, v.source) for name, v in VARIANTS.items()]


def _parse_layer(text: str) -> Layer:
  name, *settings = text.split(":")
  layer = make_layer(name)
  given: dict[str, Any] = {}
  for setting in settings:
    option, equals, value = setting.partition("=")
    if not equals:
      raise ValueError(f"{setting!r} in {text!r} must be written as option=value.")
    if option in given:
      raise ValueError(f"{option!r} is given twice in {text!r}.")
    make_layer(name, **{option: None})  # raises if it is unknown
    given[option] = _parse_value(option, value, layer.options.get(option, ""))
  return make_layer(name, **given)


def _parse_value(option: str, text: str, default: Option) -> Option:
  """`text` as the type of `default`; where that is None, a number or none."""
  if isinstance(default, str):
    return text
  kind, readers = _READERS[type(default)]
  for reader in readers:
    try:
      return reader(text)
    except (ValueError, KeyError):
      continue
  raise ValueError(f"{option}={text!r} must be {kind}.")


_READERS: Final[Mapping[type, tuple[str, tuple[Callable[[str], Option], ...]]]] = {
  bool: ("true or false", ({"true": True, "false": False}.__getitem__,)),
  int: ("a whole number", (int,)),
  float: ("a number", (float,)),
  type(None): ("a number, or none", ({"none": None}.__getitem__, int, float)),
}
