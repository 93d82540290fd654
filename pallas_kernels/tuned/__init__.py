"""Block sizes that were measured: a table per chip, which `look_up` reads while a kernel is traced.

`h200.json`, if it is there, was written by

    python -m experiments.benchmark --suite=gpu --tune

and says with which jax, when, and from which commit. An entry is an object of `plans`:

    {"what": "forward", "dtype": "bfloat16", "H": 128, "h": 128, "causal": true,
     "plan": {"warpgroups": 2, "others": 128, "stages": [2, 2]}, ...}

where `what` is the pass and `plan` holds the fields of the kernel's plan that it replaces. Without
an entry the kernel takes its own. The environment variable FRUGAL_TUNED names another folder of
such tables: of a chip of your own, or of a candidate while it is measured.
"""

import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp

FOLDER = pathlib.Path(__file__).parent


def look_up(
  chip: str, what: str, *, dtype: Any, H: int, h: int, causal: bool | None = None
) -> dict[str, Any]:
  """The fields of the plan that was measured to be the fastest, or {}.

  Args:
    chip: the table's name, "h200".
    what: the pass, "forward", "d_query" or "d_key".
    dtype: of the inputs.
    H: head width of the keys. h: head width of the values.
    causal: whether the mask is; None, where a kernel cannot know, takes the causal entry first.
  """
  path = pathlib.Path(os.environ.get("FRUGAL_TUNED") or FOLDER, f"{chip}.json")
  if not path.exists():
    return {}
  wanted = {"what": what, "dtype": jnp.dtype(dtype).name, "H": H, "h": h}
  found = [
    entry
    for entry in json.loads(path.read_text(encoding="utf-8"))["plans"]
    if all(entry[key] == value for key, value in wanted.items())
    and causal in (None, entry["causal"])
  ]
  found.sort(key=lambda entry: not entry["causal"])
  return {name: _hashable(value) for name, value in found[0]["plan"].items()} if found else {}


def _hashable(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value
