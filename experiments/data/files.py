"""Texts of one's own: every file that a pattern matches, as bytes."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.data.corpus import Corpus, Document, build


def load(pattern: str, *, valid_fraction: float = 0.1) -> Corpus:
  """Reads the files that `pattern` matches and splits them.

  Files are split by file where that comes near `valid_fraction`; a single file, a few, or very
  uneven ones lose their ends instead. The card says which. Empty files among others are skipped.

  Args:
    pattern: A path or a glob; `**` stands for any folders, `~` for the user's own.
    valid_fraction: The share of bytes to hold out.

  Raises:
    ValueError: Nothing matches, a folder is named, a file is unreadable, all files are empty.
  """
  paths = _match(pattern)
  root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
  documents = [
    Document(Path(os.path.relpath(path, root)).as_posix(), _read(path)) for path in paths
  ]
  if not any(document.data for document in documents):
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    raise ValueError(f"data.path={pattern!r}: the file {paths[0]!r}{more} is empty")
  return build(
    documents,
    valid_fraction=valid_fraction,
    name="files",
    description="Local files as bytes; exact duplicates and empty files removed before the split.",
    licence="NOASSERTION",
    origin=f"local files matching {os.path.basename(pattern.rstrip('/'))!r}",
  )


def _match(pattern: str) -> Sequence[str]:
  """The regular files that the pattern names, at least one."""
  expanded = os.path.expanduser(pattern)
  # A name that exists is meant as it stands, even with brackets in it.
  found = [expanded] if os.path.lexists(expanded) else glob.glob(expanded, recursive=True)
  if not found:
    raise ValueError(f"data.path={pattern!r} matches no file")
  files = sorted(path for path in found if os.path.isfile(path))
  if not files and os.path.isdir(found[0]):
    wish = os.path.join(pattern, "**", "*.txt")
    raise ValueError(
      f"data.path={pattern!r} names a folder, not files; a pattern such as {wish!r} reads what is "
      "in it"
    )
  if not files:
    raise ValueError(f"data.path={pattern!r}: {found[0]!r} is not a regular file")
  return files


def _read(path: str) -> bytes:
  try:
    return Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"data.path: cannot read {path!r}: {error.strerror or error}") from error
