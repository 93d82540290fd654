"""The mixer of Mamba-2: a state-space model whose heads share what they read and write with."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention.modules import sharding
from attention.modules.config import DecoderConfig
from attention.modules.mechanism import Mechanism
from attention.modules.mixer import Attention, Heads
from attention.modules.projections import Projection

DT_RANGE = (1e-3, 1e-1)
A_RANGE = (1.0, 16.0)
EPSILON = 1e-5


class Mamba2(Attention):
  """State-space duality: scalar decays by a learned step size, short convolutions, a skip, a gate.

      C, B, X = silu(conv(x W) + b)                 q, k and v; the heads of a group share C and B
      dt      = softplus(x W_dt + dt_bias)
      y       = mechanism(C, B, dt X, log_decay=-exp(A_log) dt) + D X
      out     = rms_norm(y silu(x W_z)) W_o         over the heads of a group

  Dao and Gu 2024, "Transformers are SSMs", section 7, https://arxiv.org/abs/2405.21060. With head
  width P the values have 2 D / P heads, and the state has 2 P rows (128 for the paper's P = 64).
  The number of groups is `num_kv_heads`, and 1 where that is None.
  """

  TAPS = 4

  def __init__(
    self, config: DecoderConfig, mechanism: Mechanism, *, layer: int = 0, rngs: nnx.Rngs
  ):
    super().__init__(config, mechanism, layer=layer, rngs=rngs)
    D, heads = config.width, self.heads(config)
    N, where = heads.v, sharding.spec("model_heads")
    names = ("embed", "model_heads", None)
    self.gate = Projection((D,), (N, heads.value_dim), names, rngs=rngs)
    self.step_size = Projection((D,), (N,), ("embed", "model_heads"), rngs=rngs)

    def uniform(low, high):
      return jax.random.uniform(rngs.params(), (N,), jnp.float32, low, high, out_sharding=where)

    dt = jnp.exp(uniform(*(jnp.log(x) for x in DT_RANGE)))
    self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # softplus of it is dt
    self.a_log = nnx.Param(jnp.log(uniform(*A_RANGE)))
    self.skip = nnx.Param(jnp.ones((N,), jnp.float32, out_sharding=where))
    wide = sharding.spec("model_heads", None)

    def fill(value, *shape):
      return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=wide))

    self.bias_q = fill(0.0, heads.q, heads.key_dim)
    self.bias_k = fill(0.0, heads.k, heads.key_dim)
    self.bias_v = fill(0.0, N, heads.value_dim)
    self.norm_scale = fill(1.0, N, heads.value_dim)

  @classmethod
  def heads(cls, config: DecoderConfig) -> Heads:
    """Groups of C and B, and twice as many heads of values as the model's width has room for."""
    groups, P = config.num_kv_heads or 1, config.head_width
    return Heads(groups, groups, 2 * config.num_heads, 2 * P, P)

  def inputs(self, x: Float[Array, "*B D"]) -> dict[str, jax.Array]:
    """Each token's and head's step size, float32, and its gate."""
    bias = self.dt_bias[...].reshape((1,) * (x.ndim - 1) + (-1,))
    return {"dt": jax.nn.softplus(self.step_size(x).astype(jnp.float32) + bias), "z": self.gate(x)}

  def constants(self) -> dict[str, jax.Array]:
    """What is learned per head."""
    names = ("a_log", "skip", "bias_q", "bias_k", "bias_v", "norm_scale")
    return {name: getattr(self, name)[...] for name in names}

  @staticmethod
  def around(run, q, k, v, **inputs):
    """Activations, step sizes, skip, and the gated norm of a group's heads."""
    groups, dtype, dt = k.shape[-2], v.dtype, inputs["dt"]

    def everywhere(x):
      return x.reshape((1,) * (v.ndim - 2) + x.shape)

    def active(x, name):
      return jax.nn.silu(x + everywhere(inputs[name]).astype(dtype))

    q, k, v = active(q, "bias_q"), active(k, "bias_k"), active(v, "bias_v")
    decay = -everywhere(jnp.exp(inputs["a_log"])) * dt
    y = run(q, k, v * dt[..., None].astype(dtype), log_decay=decay)
    y = y + everywhere(inputs["skip"])[..., None].astype(dtype) * v
    y = (y * jax.nn.silu(inputs["z"])).astype(jnp.float32)
    grouped = y.reshape(*y.shape[:-2], groups, -1)
    size = jnp.mean(grouped * grouped, axis=-1, keepdims=True)
    y = (grouped * jax.lax.rsqrt(size + EPSILON)).reshape(y.shape)
    return (y * everywhere(inputs["norm_scale"])).astype(dtype)
