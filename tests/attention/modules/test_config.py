"""What a decoder's shape may be, and the sentence for what it may not."""

import dataclasses
from typing import Any

import pytest

from attention.modules.config import DecoderConfig


def test_derived_sizes():
  config = DecoderConfig(vocab_size=10, width=256, num_heads=4)
  assert (config.kv_heads, config.head_width, config.hidden_width) == (4, 64, 704)
  config = dataclasses.replace(config, num_kv_heads=1, head_dim=24, mlp_width=100)
  assert (config.kv_heads, config.head_width, config.hidden_width) == (1, 24, 100)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"num_layers": 0}, "num_layers=0 must be at least 1"),
    ({"mlp_width": 0}, "mlp_width=0 must be at least 1, or None"),
    ({"width": 10}, "width=10 is not divisible by num_heads=4"),
    ({"num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
    ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1"),
    ({"short_convolution": -1}, "short_convolution=-1 must be 0"),
    ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
    ({"remat": "all"}, "remat='all' is not one of none, dots, full"),
  ],
)
def test_one_sentence_for_what_cannot_be(change: dict[str, Any], sentence: str):
  with pytest.raises(ValueError, match=sentence):
    dataclasses.replace(DecoderConfig(vocab_size=16, width=16, num_heads=4), **change)
