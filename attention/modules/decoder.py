"""A decoder-only language model whose layers may each attend in a way of their own."""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attention.modules import sharding
from attention.modules.block import Block, dropout
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism
from attention.modules.norm import RMSNorm
from attention.modules.projections import Projection

Rngs = nnx.Rngs
"""Where a model's initial parameters come from: `Rngs(seed)`."""

POLICIES: Final = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a remat policy keeps for the backward pass; "none" keeps everything."""


def remat(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
  """`fn`, whose backward pass computes again what the policy `name` does not keep."""
  return fn if name == "none" else jax.checkpoint(fn, policy=POLICIES[name])


class DecoderState(NamedTuple):
  """The decoding state of a whole model."""

  positions: Int[Array, " B"]
  """The number of tokens that each row has seen."""
  layers: tuple[Any, ...]
  """One state per layer, of the layer's own kind."""


class Decoder(nnx.Module):
  """Embedding, blocks, norm, logits.

  `mechanisms` are repeated over the depth, so a hybrid is a line of configuration:
  `attention.variants.make_decoder` reads them from `config.pattern`. The model is a pytree, built
  eagerly; train it with plain JAX:

      graphdef, params = nnx.split(make_decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
      loss = lambda params, tokens: cross_entropy(nnx.merge(graphdef, params)(tokens), ...)
  """

  def __init__(self, config: DecoderConfig, mechanisms: Sequence[Mechanism], *, rngs: nnx.Rngs):
    V, D = config.vocab_size, config.width
    sharding.check_divisible("vocab_size", V, "vocab")
    sharding.check_divisible("width", D, "embed")
    self.config = config
    where = sharding.spec("vocab", "embed")
    embedding = jax.random.normal(rngs.params(), (V, D), jnp.float32, out_sharding=where)
    self.embedding = nnx.Param(embedding * 0.02)
    layers = [mechanisms[i % len(mechanisms)] for i in range(config.num_layers)]
    blocks = [Block(config, mixer, layer=i, rngs=rngs) for i, mixer in enumerate(layers)]
    self.blocks = nnx.List(blocks)
    self.norm = RMSNorm(D)
    if not config.tie_embeddings:
      self.head = Projection((D,), (V,), ("embed", "vocab"), rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    dropout_key: jax.Array | None = None,
  ) -> Float[Array, "B T V"]:
    """The logits of each next token, float32.

    Args:
      tokens: what was read so far.
      segment_ids: tokens of different ids do not see each other; for packed documents.
      positions: of each token, for rotary mechanisms; 0 to T - 1 by default.
      dropout_key: drops out when given, at `config.dropout`.
    """
    sharding.check_divisible("the batch size", tokens.shape[0], "batch")
    sharding.check_divisible("the sequence length", tokens.shape[1], "sequence")
    keys = [None] * (len(self.blocks) + 1)
    if dropout_key is not None:
      keys = [jax.random.fold_in(dropout_key, i) for i in range(len(keys))]
    x = dropout(self._embed(tokens, "batch", "sequence"), self.config.dropout, keys[-1])
    for block, key in zip(self.blocks, keys[:-1], strict=True):

      def run(x, key, block=block):
        return block(x, segment_ids=segment_ids, positions=positions, dropout_key=key)

      x = remat(run, self.config.remat)(x, key)
    return self._logits(x)

  def init_state(self, batch: int, max_length: int) -> DecoderState:
    """The state of no token, with room for `max_length` per row."""
    sharding.check_divisible("the batch size", batch, "batch")
    positions = jnp.zeros((batch,), jnp.int32, out_sharding=sharding.spec("batch"))
    layers = tuple(block.init_state(batch, max_length) for block in self.blocks)
    return DecoderState(positions, layers)

  def prefill(
    self,
    state: DecoderState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
  ) -> tuple[DecoderState, Float[Array, "B T V"]]:
    """Reads the first `lengths` tokens of each row, after those that `state` holds.

    The logits of later tokens, which are padding, mean nothing.
    """
    B, T = tokens.shape
    x = self._embed(tokens, "batch", None)
    steps = jnp.arange(T, dtype=jnp.int32)[None]
    lengths = sharding.reshard(lengths, sharding.spec("batch"))
    positions = state.positions[:, None] + steps
    layers = []
    for block, layer in zip(self.blocks, state.layers, strict=True):
      layer, x = block.prefill(layer, x, positions=positions, lengths=lengths)
      layers.append(layer)
    read = jnp.int32(T) if lengths is None else lengths.astype(jnp.int32)
    return DecoderState(state.positions + read, tuple(layers)), self._logits(x)

  def step(
    self, state: DecoderState, tokens: Int[Array, " B"]
  ) -> tuple[DecoderState, Float[Array, "B V"]]:
    """Reads one token per row."""
    x = self._embed(tokens, "batch")
    layers = []
    for block, layer in zip(self.blocks, state.layers, strict=True):
      layer, x = block.step(layer, x, positions=state.positions)
      layers.append(layer)
    return DecoderState(state.positions + 1, tuple(layers)), self._logits(x)

  def _embed(self, tokens, *names):
    tokens = sharding.reshard(tokens, sharding.spec(*names))
    rows = self.embedding[...].astype(self.config.compute_dtype)
    rows = sharding.reshard(rows, sharding.spec("vocab", None))
    return rows.at[tokens].get(out_sharding=sharding.spec(*names, None))

  def _logits(self, x):
    x = self.norm(x)
    if not self.config.tie_embeddings:
      return self.head(x).astype(jnp.float32)
    rows = self.embedding[...].astype(x.dtype)
    return jnp.tensordot(x, rows, (x.ndim - 1, 1), preferred_element_type=jnp.float32)
