"""Where a result comes from: when, at which commit, with which versions."""

import datetime
import importlib.metadata
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Iterable
from typing import Any


def environment(packages: Iterable[str]) -> dict[str, Any]:
  """The date, the commit, and the versions of Python and of these packages, None where absent."""
  versions: dict[str, str | None] = {"python": platform.python_version()}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit(),
    "versions": versions,
  }


def commit() -> str | None:
  """The commit of the working tree, "+" if files differ from it; None outside of a repository."""
  if shutil.which("git") is None:
    return None
  here = str(pathlib.Path(__file__).parent)
  git = ["git", "-C", here, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
  return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
