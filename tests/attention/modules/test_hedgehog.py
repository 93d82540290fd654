"""Hedgehog's mixer against the sum over all pairs in float64."""

import mixer_kit as kit
import numpy as np
from flax import nnx

from attention.modules.hedgehog import HedgehogAttention
from attention.variants import parse


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def test_equals_attention_by_the_learned_features():
  mixer = kit.make("hedgehog")

  def oracle(x):
    def features(projection, matrix):
      turned = np.einsum("tnh,nmh->tnm", kit.heads(x, projection), kit.f64(matrix[...]))
      return np.concatenate([softmax(turned), softmax(-turned)], -1)

    q, k = features(mixer.query, mixer.query_map), features(mixer.key, mixer.key_map)
    scores = np.tril(np.einsum("tnm,snm->nts", q, k))
    weights = scores / scores.sum(-1, keepdims=True)
    return kit.join(mixer, np.einsum("nts,snh->tnh", weights, kit.heads(x, mixer.value)))

  kit.ask(mixer, oracle)


def test_the_maps_begin_as_the_identity():
  mixer = HedgehogAttention(kit.CONFIG, parse("hedgehog")[0], rngs=nnx.Rngs(0))
  for matrix in (mixer.query_map, mixer.key_map):
    np.testing.assert_array_equal(matrix[...], np.eye(4)[None].repeat(2, 0))
