"""Files that are written whole or not at all: a kill or a full disk leaves what was there."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a reader finds the old one or the new one, never half of it."""
  partial = path.with_name(path.name + ".partial")
  try:
    partial.write_bytes(content)
    os.replace(partial, path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise


def write_results(path: pathlib.Path, results: Mapping[str, Any]) -> None:
  """What a program measured, as JSON, in a folder that is made if need be."""
  path.parent.mkdir(parents=True, exist_ok=True)
  replace(path, (json.dumps(results, indent=1) + "\n").encode("utf-8"))
