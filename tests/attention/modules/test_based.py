"""Based's mixer against the second-order series over all pairs in float64."""

import dataclasses

import mixer_kit as kit
import numpy as np


def test_equals_the_series_of_narrow_queries_and_keys():
  config = dataclasses.replace(kit.CONFIG, head_dim=20)
  mixer = kit.make("taylor", config=config)

  def oracle(x):
    q, k, v = (kit.heads(x, w) for w in (mixer.query, mixer.key, mixer.value))
    assert q.shape[-1] == k.shape[-1] == 16 and v.shape[-1] == 20
    s = np.einsum("tnh,snh->nts", q, k) / 4
    scores = np.tril(1 + s + s**2 / 2)
    return kit.join(mixer, np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), v))

  kit.ask(mixer, oracle)
