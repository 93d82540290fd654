"""Layers that cannot be are told before anything is computed, by the text that asked for them."""

import pytest
import runs

from experiments import model
from experiments.flags import UserError

WRONG = {
  "softmax:window=0": "window must be at least 1, not 0",
  "softmax:window=1.5": "a number that is known",
  "softmax:logit_cap=0": "logit_cap must be greater than 0, not 0",
  "linear:feature_map=foo": "elu_plus_one.* got 'foo'",
  "hardmax:top_k=0": "top_k .* at least 1, not 0",
  "hardmax:top_k=1.5": "top_k .* at least 1, not 1.5",
  "stochastic:temperature=0": "temperature .* greater than 0, not 0",
  "performer:num_features=0": "num_features .* at least 1, got 0",
  "cosformer:horizon=0": "at least 1, got 0",
  "cosformer:horizon=31": "room for max_length=31 tokens, got 32",
}


@pytest.mark.parametrize("text", WRONG)
def test_options_out_of_range_name_their_layer(text):
  with pytest.raises(UserError, match=f"^--attention={text}: .*{WRONG[text]}"):
    model.check_layers(runs.tiny("unused", attention=f"softmax, {text}"), 24, 3)


def test_a_sample_longer_than_a_layer_takes_is_told_before_training():
  config = runs.tiny("unused", attention="cosformer:horizon=32", log__sample_tokens=30)
  model.check_layers(config, 24, 3)
  config = runs.tiny(
    "unused", attention="cosformer:horizon=32", log__sample_every=1, log__sample_tokens=30
  )
  with pytest.raises(UserError, match="^--attention=cosformer:horizon=32, .* 33 tokens: .*=32 "):
    model.check_layers(config, 24, 3)
