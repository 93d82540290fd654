"""One layer of a decoder."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from attention.modules import sharding
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism
from attention.modules.mlp import GatedMLP
from attention.modules.norm import RMSNorm


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes elements with probability `rate`, scales the others up; does nothing without a key."""
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=sharding.like(x))
  return jax.lax.select(keep, x / (1 - rate), jax.numpy.zeros_like(x))


class Block(nnx.Module):
  """A mixer of tokens and a mixer of channels, each behind a norm and around a residual.

  x = x + mixer(norm(x));  x = x + mlp(norm(x))
  """

  def __init__(
    self, config: DecoderConfig, mechanism: Mechanism, *, layer: int = 0, rngs: nnx.Rngs
  ):
    self.rate = config.dropout
    self.mixer_norm = RMSNorm(config.width)
    self.mixer = mechanism.mixer(config, mechanism, layer=layer, rngs=rngs)
    self.mlp_norm = RMSNorm(config.width)
    self.mlp = GatedMLP(config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    dropout_key: jax.Array | None = None,
  ) -> Float[Array, "B T D"]:
    """Whole sequences; drops out with a key."""
    keys = (None, None) if dropout_key is None else tuple(jax.random.split(dropout_key))
    mixed = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, positions=positions)
    x = x + dropout(mixed, self.rate, keys[0])
    return x + dropout(self.mlp(self.mlp_norm(x)), self.rate, keys[1])

  def init_state(self, batch: int, max_length: int) -> Any:
    """The mixer's state of no token."""
    return self.mixer.init_state(batch, max_length)

  def prefill(
    self,
    state: Any,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
  ) -> tuple[Any, Float[Array, "B T D"]]:
    """Appends the first `lengths` tokens of each row."""
    normed = self.mixer_norm(x)
    state, mixed = self.mixer.prefill(state, normed, positions=positions, lengths=lengths)
    return state, self._finish(x, mixed)

  def step(
    self, state: Any, x: Float[Array, "B D"], *, positions: Int[Array, " B"]
  ) -> tuple[Any, Float[Array, "B D"]]:
    """Appends one token to each row."""
    state, mixed = self.mixer.step(state, self.mixer_norm(x), positions=positions)
    return state, self._finish(x, mixed)

  def _finish(self, x, mixed):
    x = x + mixed
    return x + self.mlp(self.mlp_norm(x))
