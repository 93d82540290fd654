"""Efficient attention for JAX: the same answer in less memory and less time.

    from attention import dot_product_attention, linear_attention, causal

The ops are pure functions of arrays `B T N H` (see `attention.types`). Importing this costs little
more than importing jax; `VARIANTS` and the Flax modules load when they are first asked for.
"""

import importlib
from typing import Any

from attention import feature_maps as feature_maps
from attention.dispatch import explain as explain
from attention.dropout import Dropout as Dropout
from attention.dropout import make_dropout as make_dropout
from attention.masks import Mask as Mask
from attention.masks import causal as causal
from attention.masks import chunked as chunked
from attention.masks import everything as everything
from attention.masks import from_array as from_array
from attention.masks import from_function as from_function
from attention.masks import global_tokens as global_tokens
from attention.masks import lengths as lengths
from attention.masks import prefix as prefix
from attention.masks import segments as segments
from attention.masks import sliding_window as sliding_window
from attention.masks import strided as strided
from attention.online_softmax import merge as merge
from attention.ops.hardmax import direction_grid_attention as direction_grid_attention
from attention.ops.hardmax import fenwick_attention as fenwick_attention
from attention.ops.hardmax import hardmax_attention as hardmax_attention
from attention.ops.hardmax import nearest_key_attention as nearest_key_attention
from attention.ops.hardmax import softmax_mass as softmax_mass
from attention.ops.hardmax import top_k_attention as top_k_attention
from attention.ops.linear import linear_attention as linear_attention
from attention.ops.linear_scan import linear_scan as linear_scan
from attention.ops.softmax import dot_product_attention as dot_product_attention
from attention.ops.stochastic import stochastic_attention as stochastic_attention
from attention.positions import rotary as rotary
from attention.scores import alibi_slopes as alibi_slopes

_LAZY = {
  "VARIANTS": "attention.variants",
  "modules": "attention.modules",
  "variants": "attention.variants",
}


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f"module 'attention' has no attribute {name!r}")
  module = importlib.import_module(_LAZY[name])
  return module.VARIANTS if name == "VARIANTS" else module
