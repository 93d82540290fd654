"""Feature maps: phi(q) . phi(k) in place of exp(q . k / sqrt(H)), so that keys are summed first.

A feature map is a small frozen pytree, called on queries and keys alike:

    phi(x [B T N H], positions=None | int [B T], is_query=True | False) -> [B T N M],
    phi.num_features(H) == M

| name         | phi(x)                                          | M                |
|--------------|-------------------------------------------------|------------------|
| identity     | x (RetNet, GLA, Mamba-2)                        | H                |
| elu_plus_one | elu(x) + 1                                      | H                |
| relu         | max(x, 0)                                       | H                |
| taylor       | 1, x, x (x) x / sqrt 2, of x / H^(1/4)          | 1 + H + H(H+1)/2 |
| cosformer    | relu(x) cos(pi i / 2L), relu(x) sin(pi i / 2L)  | 2 H              |
| hedgehog     | softmax(x), softmax(-x)                         | 2 H              |
| favor        | exp(w_r . x - |x|^2 / 2) / sqrt M, of x / H^(1/4) | chosen         |

The features carry their own scale (`taylor` and `favor` hold the H^(-1/4) that makes the product
softmax's), which is why `linear_attention` multiplies by nothing unless told to.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attention.types import Foreign


@runtime_checkable
class FeatureMap(Protocol):
  """What `linear_attention` asks of a feature map."""

  def __call__(
    self,
    x: Float[Array, "B T N H"],
    *,
    positions: Int[Array, "B T"] | None = None,
    is_query: bool,
  ) -> Float[Array, "B T N M"]:
    """Features of queries or of keys; no token's features depend on another token."""
    ...

  def num_features(self, head_dim: int) -> int:
    """M, the width of the features of vectors of width `head_dim`."""
    ...


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("function",))
@dataclasses.dataclass(frozen=True)
class Plain:
  """A function of the vector alone, [... H] -> [... M], with nothing to learn in it."""

  function: Callable[[jax.Array], jax.Array]

  def __call__(self, x, *, positions=None, is_query):
    """Applies the function; to queries and keys alike, wherever they stand."""
    del positions, is_query
    return self.function(x)

  def num_features(self, head_dim: int) -> int:
    """The width that the function gives."""
    x = jax.ShapeDtypeStruct((1, 1, 1, head_dim), jnp.float32)
    return jax.eval_shape(self.function, x).shape[-1]


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("function",))
@dataclasses.dataclass(frozen=True)
class Given(Plain, Foreign):
  """Such a function of the caller's."""


def _identity(x: jax.Array) -> jax.Array:
  return x


def _elu_plus_one(x: jax.Array) -> jax.Array:
  # exp(x), not expm1(x) + 1: that is exactly 0 below -17, and a row of zeros has no normalizer.
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


identity = Plain(_identity)
"""phi(x) = x: scores are plain inner products, as in RetNet, GLA and Mamba-2."""

elu_plus_one = Plain(_elu_plus_one)
"""phi(x) = elu(x) + 1 > 0 (Katharopoulos et al., https://arxiv.org/abs/2006.16236, equation 7)."""

relu = Plain(jax.nn.relu)
"""phi(x) = max(x, 0) (https://arxiv.org/abs/2202.08791, section 3.1); negative queries get 0."""


def _hedgehog(x: jax.Array) -> jax.Array:
  return jnp.concatenate([jax.nn.softmax(x, axis=-1), jax.nn.softmax(-x, axis=-1)], axis=-1)


hedgehog = Plain(_hedgehog)
"""phi(x) = [softmax(x), softmax(-x)] (https://arxiv.org/abs/2402.04347, section 4), of an x that a
learned matrix has turned: `attention.modules.hedgehog` owns it."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Taylor:
  """Softmax's kernel to second order: phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(H).

  Based (Arora et al. 2024, https://arxiv.org/abs/2402.18668, section 4) writes x (x) x / sqrt 2
  with H^2 entries. It is symmetric, so half of it says all: x_i x_j once for i < j, and x_i^2 /
  sqrt 2. M = 1 + H + H(H+1)/2: 153 for H = 16.
  """

  def __call__(self, x, *, positions=None, is_query):
    """[1, x, x_i x_j (i < j), x_i^2 / sqrt 2] of x / H^(1/4)."""
    del positions, is_query
    head_dim = x.shape[-1]
    x = x * head_dim**-0.25
    rows, columns = np.triu_indices(head_dim)
    weight = np.where(rows == columns, math.sqrt(0.5), 1.0)
    weight = jnp.asarray(weight, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.concatenate(
      [jnp.ones_like(x[..., :1]), x, x[..., rows] * x[..., columns] * weight], axis=-1
    )

  def num_features(self, head_dim: int) -> int:
    """1 + H + H(H+1)/2."""
    return 1 + head_dim + head_dim * (head_dim + 1) // 2


taylor = Taylor()
"""The second-order Taylor feature map; see `Taylor`."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("max_length",))
@dataclasses.dataclass(frozen=True)
class Cosformer:
  """relu features turned by the token's position: near tokens weigh more; see `cosformer`."""

  max_length: int

  def __call__(self, x, *, positions=None, is_query):
    """[relu(x) cos(pi i / 2L), relu(x) sin(pi i / 2L)] at positions i, by default 0, 1, 2, ..."""
    del is_query
    check_length(self, x.shape[1], positions)
    if positions is None:
      positions = jnp.arange(x.shape[1])[None, :]
    angle = positions.astype(x.dtype) * jnp.asarray(math.pi / (2 * self.max_length), x.dtype)
    angle = angle[:, :, None, None]
    x = jax.nn.relu(x)
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1)

  def num_features(self, head_dim: int) -> int:
    """2 H."""
    return 2 * head_dim


def check_length(feature_map: FeatureMap, length: int, positions: jax.Array | None) -> None:
  """Raises ValueError where tokens without positions are more than a map has room for."""
  longest = getattr(feature_map, "max_length", None)
  if positions is None and longest is not None and length > longest:
    raise ValueError(f"the feature map has room for max_length={longest} tokens, got {length}")


def check_normalized(feature_map: FeatureMap, normalize: bool) -> None:
  """Raises ValueError where nothing would cancel what a map scales its queries by."""
  if not normalize and getattr(feature_map, "rescale_queries", False):
    raise ValueError(
      "'favor' scales each query's features by their greatest, which only normalize=True cancels; "
      "got normalize=False, for which there is favor(..., rescale_queries=False)"
    )


def cosformer(max_length: int) -> Cosformer:
  """cosFormer's kernel relu(q_i) . relu(k_j) cos(pi (i - j) / 2L), with L = `max_length` fixed.

  Qin et al. 2022, https://arxiv.org/abs/2202.08791, equation 10. The paper's L is the length of the
  input. A model that decodes does not know it, and a kernel that changes with the length
  contradicts its own past; so here L is a constant, at least as large as any position, and prefixes
  of a sequence get the outputs they would get alone.

  Raises:
    ValueError: `max_length` is not positive; or, when called, positions are left out and the input
      is longer.
  """
  if max_length < 1:
    raise ValueError(f"max_length must be at least 1, got {max_length}")
  return Cosformer(max_length)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("projection",), meta_fields=("rescale_queries",)
)
@dataclasses.dataclass(frozen=True)
class PositiveRandomFeatures:
  """Positive random features of softmax's kernel, with the draw that makes them; see `favor`."""

  projection: Float[Array, "M H"]
  rescale_queries: bool = True

  def __call__(self, x, *, positions=None, is_query):
    """exp(w_r . x - |x|^2 / 2) / sqrt M of x / H^(1/4), queries rescaled."""
    del positions
    head_dim = x.shape[-1]
    if head_dim != self.projection.shape[-1]:
      raise ValueError(
        f"projection is for head_dim={self.projection.shape[-1]}, got vectors of width {head_dim}"
      )
    projection = self.projection.astype(x.dtype)
    x = x * head_dim**-0.25
    logits = jnp.einsum("...h,mh->...m", x, projection, precision=jax.lax.Precision.HIGHEST)
    logits = logits - jnp.sum(x * x, axis=-1, keepdims=True) / 2
    if is_query and self.rescale_queries:
      logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.exp(jnp.minimum(logits, _LARGEST_LOGIT)) * self.projection.shape[0] ** -0.5

  def num_features(self, head_dim: int) -> int:
    """The number of random directions."""
    del head_dim
    return self.projection.shape[0]


# exp of it, summed over a million keys, is still far from float32's largest number.
_LARGEST_LOGIT = 60.0


def favor(
  key: jax.Array,
  head_dim: int,
  num_features: int,
  *,
  orthogonal: bool = True,
  rescale_queries: bool = True,
) -> PositiveRandomFeatures:
  """FAVOR+: positive random features whose product is exp(q . k / sqrt(H)) on average over draws.

      phi(x)_r = exp(w_r . x - |x|^2 / 2) / sqrt M,   x scaled by H^(-1/4),   w_r ~ N(0, I)

  Choromanski et al. 2021, https://arxiv.org/abs/2009.14794, lemma 1 and section 2.4 (orthogonal
  directions: rows of Haar rotations, each with the length of an independent Gaussian vector; still
  unbiased, with less variance).

  What keeps exp in range must not look at other tokens. The paper's code subtracts a maximum over
  all keys: in a causal model that lets a later key scale an earlier one's features down to zero,
  and the future leaks. Here keys subtract nothing. They need nothing: w . x - |x|^2 / 2 is at most
  |w|^2 / 2, about H / 2. Heads wider than 120 could reach beyond 60, with keys that are nearly a
  direction of the draw, as long as H^(3/4); there it is cut off. Queries subtract their own row's
  maximum, which the normalizer cancels exactly; so use `rescale_queries=False` where there is no
  normalizer and the product itself matters.

  Args:
    key: of the draw.
    head_dim: width H of the vectors.
    num_features: number M of random directions; blocks of H of them are orthogonal.
    orthogonal: False draws independent directions.
    rescale_queries: whether a query's features are scaled so that the largest is 1 / sqrt M.
  """
  if num_features < 1:
    raise ValueError(f"num_features must be at least 1, got {num_features}")
  key_rotation, key_norm = jax.random.split(key)
  gaussian = jax.random.normal(key_norm, (num_features, head_dim), jnp.float32)
  if orthogonal:
    blocks = -(-num_features // head_dim)
    rows = jax.random.orthogonal(key_rotation, head_dim, (blocks,), jnp.float32)
    rows = rows.reshape(-1, head_dim)[:num_features]
    gaussian = rows * jnp.linalg.norm(gaussian, axis=-1, keepdims=True)
  return PositiveRandomFeatures(gaussian, rescale_queries)


def favor_of_seed(seed: int, head_dim: int, num_features: int) -> PositiveRandomFeatures:
  """`favor`'s draw of a seed: a constant of the program, not an orthogonalization in every call."""

  def draw():
    drawn = favor(jax.random.key(seed), head_dim, num_features)
    # As NumPy's array it lies on no mesh, and so it may be used inside of shard_map.
    return jax.tree.map(np.asarray, drawn)

  with ThreadPoolExecutor(1) as elsewhere:  # A thread of its own is in no trace and on no mesh.
    return elsewhere.submit(draw).result()


_COSFORMER_LENGTH = 65536
_NAMES = ("identity", "elu_plus_one", "relu", "taylor", "cosformer", "hedgehog", "favor")


def get(
  feature_map: FeatureMap | Callable[[jax.Array], jax.Array] | str | None, head_dim: int
) -> FeatureMap:
  """The feature map of that name; None is `identity`, and a function of x alone becomes one.

  By name, `cosformer` has max_length 65536, and `favor` the draw of seed 0 with 2 H features: the
  same every time. What a function closes over is a constant; to learn it, write a pytree with
  `FeatureMap`'s two methods.

  Raises:
    ValueError: no feature map has that name, or it is no pytree.
  """
  match feature_map:
    case None | "identity":
      return identity
    case "elu_plus_one":
      return elu_plus_one
    case "relu":
      return relu
    case "taylor":
      return taylor
    case "cosformer":
      return cosformer(_COSFORMER_LENGTH)
    case "hedgehog":
      return hedgehog
    case "favor":
      return favor_of_seed(0, head_dim, 2 * head_dim)
    case str():
      raise ValueError(f"feature_map must be one of {', '.join(_NAMES)}, got {feature_map!r}")
    case FeatureMap():
      if any(leaf is feature_map for leaf in jax.tree.leaves(feature_map)):
        raise ValueError(
          "a feature map must be a pytree, so that JAX sees its arrays: register the class with "
          f"jax.tree_util.register_dataclass, got a {type(feature_map).__name__}"
        )
      return feature_map
  return Given(feature_map)
