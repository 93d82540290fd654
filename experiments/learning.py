"""One training step: loss, gradient, AdamW, averages.

Pure functions of (state, batch); what is random is a function of the seed and the step.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from attention.modules.sharding import spec
from experiments.config import Config, OptimConfig
from experiments.model import Model, Params

Batch = Mapping[str, jax.Array]


class TrainState(NamedTuple):
  """Everything that a run carries from step to step; the position in the data is `step`."""

  step: jax.Array
  """Updates done, int32."""
  params: Params
  opt_state: optax.OptState
  ema: Params | None
  """Averaged parameters; None where the run keeps none."""

  @property
  def best_params(self) -> Params:
    """What to evaluate and sample: the averaged parameters where there are any."""
    return self.params if self.ema is None else self.ema


class StepMetrics(NamedTuple):
  """What a step measured, as arrays of one element."""

  loss_sum: jax.Array
  """Sum over scored tokens, nats."""
  weight: jax.Array
  """Scored tokens."""
  grad_norm: jax.Array
  """Before clipping."""


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-log softmax(logits)[target], [B T], without a gather: the vocabulary may be sharded."""
  vocabulary = jnp.arange(logits.shape[-1], dtype=targets.dtype)
  chosen = jnp.where(targets[..., None] == vocabulary[None, None], logits, 0.0).sum(-1)
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def loss_sums(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """(sum of weighted losses, sum of weights)."""
  losses = token_losses(logits.astype(jnp.float32), batch["targets"])
  return (losses * batch["weights"]).sum(), batch["weights"].sum()


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """Updates done -> learning rate."""
  warmup = min(config.warmup, steps // 2)
  rising = optax.linear_schedule(config.lr / (warmup + 1), config.lr, warmup)
  after = steps - warmup
  if config.schedule == "cosine":
    falling = optax.cosine_decay_schedule(config.lr, max(after, 1), alpha=config.final)
    return optax.join_schedules([rising, falling], [warmup])
  constant = optax.constant_schedule(config.lr)
  if config.schedule == "constant":
    return optax.join_schedules([rising, constant], [warmup])
  decay = min(max(1, round(config.decay * steps)), after)
  falling = optax.linear_schedule(config.lr, config.final * config.lr, max(decay, 1))
  return optax.join_schedules([rising, constant, falling], [warmup, steps - decay])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
  """Clipping and AdamW; parameters of a single axis, such as a norm's, do not decay."""
  adamw = optax.adamw(
    schedule(config, steps),
    b1=config.b1,
    b2=config.b2,
    weight_decay=config.weight_decay,
    mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
  )
  return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def init_state(config: Config, model: Model) -> TrainState:
  """The state before the first step, on the mesh in context."""
  optimizer = make_optimizer(config.optim, config.steps)

  @jax.jit
  def init(key: jax.Array) -> TrainState:
    params = model.init(key)
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), ema)

  return init(jax.random.key(config.seed))


def make_step(
  config: Config, model: Model
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
  """The training step, compiled; it consumes the state that it is given."""
  optimizer = make_optimizer(config.optim, config.steps)
  pieces = config.optim.accumulate

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    key = None
    if config.model.dropout:
      key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grads, loss_sum, weight = _gradient(model, state.params, _cut(batch, pieces), key)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), grads)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else _average(state.ema, params, state.step, config.optim.ema)
    metrics = StepMetrics(loss_sum, weight, optax.tree.norm(grads))
    return TrainState(state.step + 1, params, opt_state, ema), metrics

  return jax.jit(step, donate_argnums=0)


def _cut(batch: Batch, pieces: int) -> Batch:
  """[B T] -> [pieces, B / pieces, T]; every device keeps the rows that it has."""

  def cut(x: jax.Array) -> jax.Array:
    B, T = x.shape
    where = spec("batch", None, "sequence")
    return jax.lax.reshape(x, (B // pieces, pieces, T), out_sharding=where).swapaxes(0, 1)

  return {name: cut(x) for name, x in batch.items()}


def _gradient(
  model: Model, params: Params, cut: Batch, key: jax.Array | None
) -> tuple[Params, jax.Array, jax.Array]:
  """Gradient of the summed loss, that sum, and the sum of weights, over all pieces of a batch."""
  pieces = cut["inputs"].shape[0]

  def loss(params: Params, piece: Batch, index: jax.Array):
    dropout_key = None if key is None else jax.random.fold_in(key, index)
    return loss_sums(model(params, piece["inputs"], dropout_key=dropout_key), piece)

  def one(params: Params, piece: Batch, index: jax.Array):
    (loss_sum, weight), grads = jax.value_and_grad(loss, has_aux=True)(params, piece, index)
    return grads, loss_sum, weight

  if pieces == 1:
    return one(params, {name: x[0] for name, x in cut.items()}, jnp.int32(0))

  def add(total, indexed):
    return jax.tree.map(jnp.add, total, one(params, *indexed)), None

  nothing = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.float32(0))
  return jax.lax.scan(add, nothing, (dict(cut), jnp.arange(pieces, dtype=jnp.int32)))[0]


def _average(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
  """ema <- d ema + (1 - d) params, where d grows to `decay`: the first steps do not linger."""
  seen = step.astype(jnp.float32)
  d = jnp.minimum(decay, (1 + seen) / (10 + seen))
  return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
