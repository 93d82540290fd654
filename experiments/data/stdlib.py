"""The default text: the source of the running Python's standard library. No download."""

import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from experiments.data.corpus import Corpus, Document, build

_SKIPPED = frozenset(
  {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
)
"""Folders that hold tests (left out by some distributions), other people's code, or no source."""


def load(*, valid_fraction: float = 0.1, root: Path | None = None) -> Corpus:
  """Reads the library's `.py` files, without tests, and splits them by file.

  Only modules named in `sys.stdlib_module_names` count: what a distribution adds to the folder
  (build settings, customization hooks) differs from machine to machine and is left out.

  Args:
    valid_fraction: The share of bytes to hold out.
    root: The library's folder; None asks the running Python.

  Raises:
    ValueError: The folder holds no source (a stripped Python), or a file cannot be read.
  """
  root = Path(sysconfig.get_path("stdlib")) if root is None else root
  documents = list(_documents(root))
  if not documents:
    raise ValueError(
      "this Python comes without the source of its standard library; give texts with --data.path"
    )
  version = platform.python_version()
  return build(
    documents,
    valid_fraction=valid_fraction,
    name="stdlib",
    description=(
      "Source files (.py) of the Python standard library as bytes, without its tests; exact "
      "duplicates and empty files removed before the split."
    ),
    licence="PSF-2.0",
    origin=f"{platform.python_implementation()} {version} standard library",
    version=version,
  )


def _documents(root: Path) -> Iterator[Document]:
  """The library's own source files under `root`, named by their path below it."""
  for folder, folders, files in root.walk():
    folders[:] = [name for name in folders if name not in _SKIPPED]
    for file in files:
      path = folder / file
      name = path.relative_to(root)
      if path.suffix == ".py" and name.parts[0].removesuffix(".py") in sys.stdlib_module_names:
        try:
          yield Document(name.as_posix(), path.read_bytes())
        except OSError as error:
          raise ValueError(
            f"cannot read {name.as_posix()!r} of the standard library: {error.strerror}"
          ) from error
