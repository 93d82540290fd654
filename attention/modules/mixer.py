"""The part of a block that mixes tokens, for any mechanism."""

import functools
import math

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from attention.modules import convolution, sharding
from attention.modules import mechanism as local
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism, State
from attention.modules.projections import Projection


class Attention(nnx.Module):
  """Projects x to queries, keys and values, lets `mechanism` mix them, and projects back.

      out = mechanism(rotary(conv(x W_q)), rotary(conv(x W_k)), conv(x W_v)) W_o

  It does not know which attention it is. A mixer that learns more overrides `inputs`, which the
  mechanism gets beside q, k and v, or `readout`.
  """

  def __init__(self, config: DecoderConfig, mechanism: Mechanism, *, rngs: nnx.Rngs):
    D, N, K, H = config.width, config.num_heads, config.kv_heads, config.head_width
    sharding.check_divisible("num_kv_heads", K, "heads")
    self.config, self.mechanism = config, mechanism
    names = ("embed", "model_heads", None)
    residual = 1 / math.sqrt(2 * config.num_layers)
    self.query = Projection((D,), (N, H), names, rngs=rngs)
    self.key = Projection((D,), (K, H), names, rngs=rngs)
    self.value = Projection((D,), (K, H), names, rngs=rngs)
    self.out = Projection((N, H), (D,), ("model_heads", None, "embed"), scale=residual, rngs=rngs)
    taps, heads = config.short_convolution, (N, K, K) if config.short_convolution else ()
    self.convolutions = nnx.List([convolution.ShortConvolution(taps, n, H) for n in heads])

  def inputs(self, x: Float[Array, "*B D"]) -> dict[str, jax.Array]:
    """What the mechanism reads beside q, k and v: arrays `*B N ...` by name."""
    del x
    return {}

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
    arguments = (q, k, v, self.inputs(x), weights, segment_ids, positions)
    where = (heads, heads, heads, heads, sharding.spec("heads"), tokens, tokens)
    out = sharding.boundary(
      functools.partial(local.attend, self.mechanism), arguments, where, heads
    )
    return self.readout(sharding.reshard(out, sharding.like(q)), x)

  def init_state(self, batch: int, max_length: int) -> State:
    """The state of no token, with room for `max_length`."""
    config, dtype = self.config, self.config.compute_dtype
    state = self.mechanism.init_state(
      batch,
      num_heads=config.num_heads,
      num_kv_heads=config.kv_heads,
      head_dim=config.head_width,
      value_dim=config.head_width,
      max_length=max_length,
      dtype=dtype,
    )
    state = State(state, tuple(conv.init_state(batch, dtype) for conv in self.convolutions))
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
    arguments = (state, q, k, v, self.inputs(x), weights, *tokens)
    where = (rows, rows, rows, rows, rows, sharding.spec(), *(rows for _ in tokens))
    fn = functools.partial(fn, self.mechanism)
    state, out = sharding.boundary(fn, arguments, where, rows)
    return state, self.readout(sharding.reshard(out, sharding.like(q)), x)

  def _project(self, x):
    weights = tuple(conv.weight[...].astype(x.dtype) for conv in self.convolutions)
    return self.query(x), self.key(x), self.value(x), weights
