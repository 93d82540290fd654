"""Softmax attention by cuDNN, through `jax.nn`: for NVIDIA GPUs from Ampere on that have no
kernel of ours.

It takes the masks that cuDNN knows by name (causal, a window behind it, row lengths) and refuses
what it would have to be handed as T x S numbers, or answers with a wrong gradient: a mask becomes a
dense bias there, and the cotangent of its log-sum-exp is dropped.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attention import chips, masks
from attention.masks import Mask

_MOST_HEAD_DIM = 128


def unsupported(call: Any) -> str | None:
  """Why cuDNN cannot run a call of `dot_product_attention`, forward and backward, or None."""
  q, _, v = call[:3]
  H, h = q.shape[-1], v.shape[-1]
  if reason := chips.not_ampere():
    return reason
  if q.dtype not in (jnp.float16, jnp.bfloat16):
    return f"it takes float16 and bfloat16, not {q.dtype}"
  if h != H or H % 8 or H > _MOST_HEAD_DIM:
    return f"it needs H = h, a multiple of 8 up to {_MOST_HEAD_DIM}, not H={H}, h={h}"
  if call.residual:
    return "the gradient of its log-sum-exp is dropped"
  present = {
    "a bias": call.modifiers.bias, "ALiBi": call.modifiers.alibi_slopes, "sinks": call.sinks,
    "a logit cap": call.logit_cap, "dropout": call.dropout,
  }  # fmt: skip
  missing = [name for name, value in present.items() if value is not None]
  if missing:
    return f"it is not given {' and '.join(missing)}"
  return None if _known(call.mask) is not None else "its mask would be a T x S array"


def attend(call: Any) -> tuple[Array, Array | None]:
  """The output `B T N h`; no log-sum-exp."""
  known = _known(call.mask)
  assert known is not None, "`unsupported` was asked"
  out = jax.nn.dot_product_attention(*call[:3], scale=call.scale, implementation="cudnn", **known)
  return out, None


def _known(mask: Mask) -> dict[str, Any] | None:
  """The mask as arguments of `jax.nn.dot_product_attention`, or None where it has no such words."""
  match mask:
    case masks.And():
      left, right = _known(mask.left), _known(mask.right)
      if left is None or right is None or (set(left) & set(right)) - {"is_causal"}:
        return None
      return left | right
    case masks.Band(left=None, right=None):
      return {}
    case masks.Band(left=None, right=0):
      return {"is_causal": True}
    case masks.Band(left=int(left), right=0):
      return {"is_causal": True, "local_window_size": (left, 0)}
    case masks.Lengths():
      lengths = {"query_seq_lengths": mask.query, "key_value_seq_lengths": mask.key}
      return {name: x for name, x in lengths.items() if x is not None}
  return None
