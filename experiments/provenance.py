"""Where a result comes from: when, at which commit, with which versions, by which command, on what
processor; and where it is to go.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.benchmarks import resident
from experiments.flags import UserError


def environment(packages: Iterable[str]) -> dict[str, Any]:
  """The date, the commit, the command, the machine, and the versions of Python and of these
  packages, None where absent.
  """
  versions: dict[str, str | None] = {"python": platform.python_version()}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit(),
    "command": command(sys.argv[1:]),
    "processor": processor(),
    "cores": resident.cores(),
    "system": f"{platform.system()} {platform.machine()}",
    "versions": versions,
  }


def commit() -> str | None:
  """The commit of the working tree, "+" if files differ from it; None outside of a repository."""
  if shutil.which("git") is None:
    return None
  here = str(pathlib.Path(__file__).parent)
  git = ["git", "-C", here, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
  return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def command(arguments: Sequence[str]) -> str:
  """The command line of the program that runs, with PATH for what has a slash in it: where files
  and interpreters lie is this machine's business.
  """
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  program = ["-m", spec.name] if spec else [pathlib.Path(sys.argv[0]).name]
  shown = []
  for argument in arguments:
    name, equals, value = argument.rpartition("=")
    shown.append(f"{name}{equals}PATH" if os.sep in value else argument)
  return shlex.join(["python", *program, *shown])


def processor() -> str:
  """The processor's model, as Linux tells it."""
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return models[0] if models else platform.processor()


def prepare(path: pathlib.Path) -> None:
  """Makes the folder of results that are yet to be measured.

  Raises:
    UserError: they could not be written, or what is drawn beside them would take their place.
  """
  if path.suffix != ".json":
    raise UserError(f"--out={path} must end in .json, and ends in {path.suffix!r}")
  if path.is_dir():
    raise UserError(f"--out={path} is a folder, and a file is to be written there")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as error:
    raise UserError(f"--out={path} cannot be written: {error}") from error
