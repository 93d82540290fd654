"""Every attention mechanism by name: flags, tests, benchmarks and tables derive from this dict.

    parse("linear,linear,softmax:window=128")     the layers of a hybrid, as bound mechanisms
    make_decoder(config, rngs=nnx.Rngs(0))        a model with `config.pattern`
    table()                                       the rows of the README

A new mechanism is an entry of `VARIANTS`, beside its file in `attention/ops` and its test.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from attention.dispatch import suggest
from attention.modules.config import DecoderConfig
from attention.modules.decoder import Decoder, Rngs
from attention.modules.gated import GatedAttention
from attention.modules.mixer import Attention
from attention.ops import linear, softmax
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
    attend=linear.attend,
    reference=linear.reference,
    init_state=linear.init_state,
    prefill=linear.prefill,
    step=linear.step,
    cost=linear.cost,
    options={"feature_map": "elu_plus_one", "normalize": True},
    summary="Linear attention: a feature map in place of exp, so that the past is one matrix.",
    complexity="O(T) time and memory, O(1) state",
    source="[Katharopoulos et al. 2020](https://arxiv.org/abs/2006.16236)",
  ),
  "gated_linear": Variant(
    attend=linear.attend,
    reference=linear.reference,
    init_state=linear.init_state,
    prefill=linear.prefill,
    step=linear.step,
    cost=linear.cost,
    mixer=GatedAttention,
    options={"feature_map": "identity", "normalize": False},
    example_inputs=decay_inputs,
    summary="Linear attention whose channels forget at a rate that the input sets.",
    complexity="O(T) time and memory, O(1) state",
    source="[Yang et al. 2023](https://arxiv.org/abs/2312.06635)",
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
