"""From a configuration to a model: its static part, and its parameters as plain dictionaries."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention import variants
from attention.modules.config import DecoderConfig
from attention.modules.decoder import Decoder
from experiments import flags
from experiments.config import Config
from experiments.flags import blame_user

Params = Any


class Model(NamedTuple):
  """A decoder without its parameters; pure functions of them."""

  config: DecoderConfig
  graph: nnx.GraphDef
  init: Callable[[jax.Array], Params]
  """key -> parameters; sharded over the mesh in context."""

  def bind(self, params: Params) -> Decoder:
    """The decoder with these parameters."""
    return nnx.merge(self.graph, params)

  def __call__(self, params: Params, tokens: jax.Array, **how: Any) -> jax.Array:
    """Logits [B T V] of the tokens [B T]."""
    return self.bind(params)(tokens, **how)


def decoder_config(config: Config, vocab_size: int) -> DecoderConfig:
  """What the flags say of the decoder."""
  model = config.model
  return DecoderConfig(
    vocab_size=vocab_size,
    num_layers=model.num_layers,
    width=model.width,
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads or None,
    head_dim=model.head_dim or None,
    mlp_width=model.mlp_width or None,
    pattern=config.attention,
    short_convolution=model.short_convolution,
    dropout=model.dropout,
    tie_embeddings=model.tie_embeddings,
    dtype=model.dtype,
    remat=model.remat,
  )


def make_model(config: Config, vocab_size: int) -> Model:
  """The model of a run.

  Raises:
    UserError: an unknown mechanism or option, or sizes that do not fit it or the mesh in context.
  """
  with blame_user((ValueError, NotImplementedError)):
    shape = decoder_config(config, vocab_size)
    variants.parse(shape.pattern)

    def build(key: jax.Array) -> Decoder:
      return variants.make_decoder(shape, rngs=nnx.Rngs(params=key))

    graph, _ = nnx.split(nnx.eval_shape(build, jax.random.key(0)))

  @jax.jit
  def init(key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(build(key)))

  return Model(shape, graph, init)


def check_layers(config: Config, vocab_size: int, prompt: int) -> None:
  """Traces each kind of layer alone, as it trains and as it continues `prompt` tokens by a sample.

  Raises:
    UserError: an option of a layer, or the length of a sequence, is not for it; names the layer.
  """
  for text in dict.fromkeys(part.strip() for part in config.attention.split(",")):
    alone = flags.replace(config, {"attention": text, "model.num_layers": 1})
    _trace(alone, make_model(alone, vocab_size), prompt)


def _trace(config: Config, model: Model, prompt: int) -> None:
  kinds, layer = (ValueError, TypeError, NotImplementedError), f"--attention={config.attention}"
  tokens = lambda B, T: jax.ShapeDtypeStruct((B, T), jnp.int32)
  with blame_user(kinds, f"{layer}: "):
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = tokens(config.batch_size // config.optim.accumulate, config.seq_len)
    jax.eval_shape(lambda params, batch: model(params, batch), params, batch)
  if not config.log.sample_every:
    return
  room = prompt + config.log.sample_tokens

  def write(params: Params, tokens: jax.Array) -> Any:
    decoder = model.bind(params)
    state, _ = decoder.prefill(decoder.init_state(1, room), tokens, jnp.array([prompt], jnp.int32))
    return decoder.step(state, tokens[:, 0])

  with blame_user(kinds, f"{layer}, of which a sample takes {room} tokens: "):
    jax.eval_shape(write, params, tokens(1, prompt))


def parameter_count(params: Params) -> int:
  """The number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
