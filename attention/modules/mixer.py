"""The part of a block that mixes tokens, for any mechanism."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from attention.modules import convolution, sharding
from attention.modules import mechanism as local
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism, State
from attention.modules.projections import Projection


class Heads(NamedTuple):
  """How many heads queries, keys and values have, and how wide they are."""

  q: int
  k: int
  """0: the mixer makes no keys of the input; `around` has them from elsewhere."""
  v: int
  key_dim: int
  """H."""
  value_dim: int
  """h."""

  @property
  def out(self) -> int:
    """N, of the output and of the state."""
    return max(self.q, self.v)


class Attention(nnx.Module):
  """Projects x to queries, keys and values, lets `mechanism` mix them, and projects back.

      out = mechanism(rotary(conv(x W_q)), rotary(conv(x W_k)), conv(x W_v)) W_o

  It does not know which attention it is. A mixer that learns more overrides `heads`, how wide q, k
  and v are; `inputs` and `constants`, which the mechanism gets beside them; `around`, what is done
  between convolution and mechanism, and to the mechanism's output; or `readout`.
  """

  TAPS: ClassVar[int | None] = None
  """Of the short convolutions, where the mechanism's paper says so; None takes the config's."""
  CONVOLVED: ClassVar[tuple[bool, bool, bool]] = (True, True, True)
  """Which of q, k and v are convolved."""

  def __init__(
    self, config: DecoderConfig, mechanism: Mechanism, *, layer: int = 0, rngs: nnx.Rngs
  ):
    D, heads = config.width, self.heads(config)
    sharding.check_divisible("num_kv_heads", heads.k or heads.v, "heads")
    self.config, self.mechanism, self.layer = config, mechanism, layer
    names = ("embed", "model_heads", None)
    residual = 1 / math.sqrt(2 * config.num_layers)
    wide, out = (heads.k, heads.key_dim), (heads.out, heads.value_dim)
    self.query = Projection((D,), (heads.q, heads.key_dim), names, rngs=rngs)
    self.key = Projection((D,), wide, names, rngs=rngs) if heads.k else None
    self.value = Projection((D,), (heads.v, heads.value_dim), names, rngs=rngs)
    self.out = Projection(out, (D,), ("model_heads", None, "embed"), scale=residual, rngs=rngs)
    taps = config.short_convolution if self.TAPS is None else self.TAPS
    widths = (heads.key_dim, heads.key_dim, heads.value_dim)
    self.convolutions = nnx.List(
      [
        convolution.ShortConvolution(taps, n, width)
        for n, width, convolved in zip(heads[:3], widths, self.CONVOLVED, strict=True)
        if convolved and taps
      ]
    )

  @classmethod
  def heads(cls, config: DecoderConfig) -> Heads:
    """What the mixer makes of these sizes."""
    H, K = config.head_width, config.kv_heads
    return Heads(config.num_heads, K, K, H, H)

  def inputs(self, x: Float[Array, "*B D"]) -> dict[str, jax.Array]:
    """What the mechanism reads beside q, k and v: arrays `*B N ...` by name."""
    del x
    return {}

  def constants(self) -> dict[str, jax.Array]:
    """What it reads that is the same for every token: arrays `N ...` by name."""
    return {}

  @staticmethod
  def around(run: Callable[..., jax.Array], q: Any, k: Any, v: Any, **inputs: Any) -> jax.Array:
    """What is done to some heads around the mechanism, which is `run`; see `mechanism.Around`."""
    return local.plain(run, q, k, v, **inputs)

  def readout(self, out: Float[Array, "*B N h"], x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """From the heads back to the model's width."""
    return self.out(out, out_sharding=sharding.like(x))

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Whole sequences."""
    heads, tokens = sharding.spec("batch", None, "heads"), sharding.spec("batch")
    q, k, v, weights = self._project(x)
    arguments = (q, k, v, self.inputs(x), weights, segment_ids, positions, self.constants())
    by_head = sharding.spec("heads")
    where = (heads, heads, heads, heads, by_head, tokens, tokens, by_head)
    fn = functools.partial(local.attend, self.mechanism, around=self.around)
    out = sharding.boundary(fn, arguments, where, heads)
    return self.readout(sharding.reshard(out, sharding.like(q)), x)

  def init_state(self, batch: int, max_length: int) -> State:
    """The state of no token, with room for `max_length`."""
    heads, dtype = self.heads(self.config), self.config.compute_dtype
    state = self.mechanism.init_state(
      batch,
      num_heads=heads.out,
      num_kv_heads=heads.k or heads.v,
      head_dim=heads.key_dim,
      value_dim=heads.value_dim,
      max_length=max_length,
      dtype=dtype,
    )
    windows = [conv.init_state(batch, dtype) for conv in self.convolutions]
    state = State(state, self._each_of_qkv(windows))
    return sharding.reshard(state, sharding.spec("batch"))

  def prefill(
    self,
    state: State,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
  ) -> tuple[State, Float[Array, "B T D"]]:
    """Appends the first `lengths` tokens of each row; all of them when that is None."""
    return self._decode(local.prefill, state, x, positions, lengths)

  def step(
    self, state: State, x: Float[Array, "B D"], *, positions: Int[Array, " B"]
  ) -> tuple[State, Float[Array, "B D"]]:
    """Appends one token to each row."""
    return self._decode(local.step, state, x, positions)

  def _decode(self, fn, state, x, *tokens):
    """Cuts the batch alone: a state of any structure lies on the mesh by its first axis."""
    rows = sharding.spec("batch")
    q, k, v, weights = self._project(x)
    arguments = (state, q, k, v, self.inputs(x), weights, *tokens, self.constants())
    whole = sharding.spec()
    where = (rows, rows, rows, rows, rows, whole, *(rows for _ in tokens), whole)
    fn = functools.partial(fn, self.mechanism, around=self.around)
    state, out = sharding.boundary(fn, arguments, where, rows)
    return state, self.readout(sharding.reshard(out, sharding.like(q)), x)

  def _project(self, x):
    weights = self._each_of_qkv([conv.weight[...].astype(x.dtype) for conv in self.convolutions])
    k = None if self.key is None else self.key(x)
    return self.query(x), k, self.value(x), weights

  def _each_of_qkv(self, convolved):
    """One for each of q, k and v, None for what is not convolved; () where nothing is."""
    rest = iter(convolved)
    return tuple(next(rest) if yes else None for yes in self.CONVOLVED) if convolved else ()
