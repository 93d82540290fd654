"""Command-line flags, generated from a tree of frozen dataclasses.

A leaf `lr` of the sub-tree `optim` becomes the absl flag `--optim.lr`, with the field's type,
default and help text. Each program parses its own command line into its own dataclass: nothing is
registered globally, and library code reads no flag.
"""

import dataclasses
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from absl import flags

from attention.dispatch import suggest


class UserError(Exception):
  """What the person at the terminal can put right: one sentence, and no traceback."""


class HelpAsked(Exception):
  """Raised by `parse` on `--help`; carries the text to print."""


def knob(default: Any, help: str, bounds: str = "", free: bool = False) -> Any:
  """A field that becomes a flag.

  Args:
    default: its value when nobody says otherwise; its type is the field's annotation.
    help: what it does, with its unit.
    bounds: the values allowed, as an interval such as "[0, 1)" or "(0, inf)"; empty allows all.
    free: a run may be resumed with another value; the mathematics of a step stays the same.
  """
  return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds, "free": free})


def leaves(config: Any, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field]]:
  """Every leaf of a tree of dataclasses: dotted name -> (value, field)."""
  found: dict[str, tuple[Any, dataclasses.Field]] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      found |= leaves(value, f"{prefix}{field.name}.")
    else:
      found[prefix + field.name] = (value, field)
  return found


def replace[T](config: T, values: Mapping[str, Any]) -> T:
  """A copy of the tree with the leaves named in `values` (dotted names) replaced."""
  here = {name: value for name, value in values.items() if "." not in name}
  below: dict[str, dict[str, Any]] = {}
  for name, value in values.items():
    if "." in name:
      branch, rest = name.split(".", 1)
      below.setdefault(branch, {})[rest] = value
  for branch, part in below.items():
    here[branch] = replace(getattr(config, branch), part)
  return dataclasses.replace(config, **here)  # type: ignore[type-var]


def check_bounds(config: Any) -> None:
  """Raises ValueError for a leaf outside its field's bounds or choices, naming both."""
  for name, (value, field) in leaves(config).items():
    if typing.get_origin(field.type) is typing.Literal:
      choices = typing.get_args(field.type)
      if value not in choices:
        raise ValueError(f"--{name} is one of {', '.join(choices)}, not {value!r}")
      continue
    if type(value) is int and field.type is float:
      value = float(value)
    if type(value) is not field.type:
      raise ValueError(f"--{name} is of type {getattr(field.type, '__name__', '?')}, not {value!r}")
    bounds = field.metadata.get("bounds", "")
    if bounds and not _inside(value, bounds):
      raise ValueError(f"--{name}={value!r} is outside {bounds}")


def _inside(value: float, bounds: str) -> bool:
  low, high = (float(end) for end in bounds[1:-1].split(","))
  above = value >= low if bounds[0] == "[" else value > low
  return above and (value <= high if bounds[-1] == "]" else value < high)


def define_flags(config: Any, flag_values: flags.FlagValues) -> None:
  """Defines one flag per leaf of `config` in `flag_values`."""
  for name, (value, field) in leaves(config).items():
    define, kind, help = _definer(field.type), field.type, field.metadata.get("help", name)
    if typing.get_origin(kind) is typing.Literal:
      flags.DEFINE_enum(name, value, list(typing.get_args(kind)), help, flag_values)
    elif define is None:
      raise TypeError(f"there is no flag for --{name} of type {kind}")
    else:
      define(name, value, help, flag_values=flag_values)


def _definer(kind: Any) -> Callable[..., Any] | None:
  table = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  return table.get(kind)


def parse[T](
  argv: Sequence[str], default: T, *, doc: str, presets: Mapping[str, Mapping[str, Any]] = {}
) -> T:
  """Parses a command line into a tree like `default`.

  `--preset=name` changes defaults before the rest of the command line is read, wherever it stands.
  `--flagfile=path` reads flags from a file, in place.

  Raises:
    UserError: an unknown flag, a bad value, or values that do not go together.
    HelpAsked: `--help` is among the arguments.
  """
  read = _read(argv, default, doc)
  if presets:
    name = str(read["preset"].value)
    if name not in presets:
      raise UserError(unknown("--preset", name, presets))
    default = replace(default, dict(presets[name]) | {"preset": name})
    read = _read(argv, default, doc)
  values = {name: read[name].value for name in leaves(default)}
  with blame_user():
    return replace(default, values)


def _read(argv: Sequence[str], default: Any, doc: str) -> flags.FlagValues:
  read = flags.FlagValues()
  define_flags(default, read)
  flags.DEFINE_bool("help", False, "Print this page.", flag_values=read)
  try:
    rest = read(list(argv))[1:]
  except flags.Error as error:
    raise UserError(" ".join(str(error).split())) from error
  except OSError as error:
    raise UserError(f"--flagfile: {error}") from error
  if read["help"].value:
    raise HelpAsked(help_text(argv[0], default, doc))
  if rest:
    raise UserError(f"{rest[0]!r} is not a flag: write --name=value")
  return read


def help_text(program: str, default: Any, doc: str) -> str:
  """The page that `--help` prints: what the program does, then each flag by section."""
  lines, section = [doc.strip(), "", "Flags, and what they are when not given:"], None
  for name, (value, field) in leaves(default).items():
    if section != (section := name.rpartition(".")[0]):
      lines.append("")
    text, kind = field.metadata.get("help", ""), field.type
    if typing.get_origin(kind) is typing.Literal:
      text += f" One of: {', '.join(typing.get_args(kind))}."
    head = f"  --{name}={_text(value)}"
    lines += textwrap.wrap(
      text,
      100,
      initial_indent=f"{head:<32}  " if len(head) <= 32 else f"{head}\n{'':34}",
      subsequent_indent=" " * 34,
    )
  lines += ["", f"  {'--flagfile=PATH':<32}Read flags from a file, such as a run's own flags.txt."]
  return "\n".join(lines)


def to_text(config: Any) -> str:
  """The whole tree as lines `--name=value`, which `--flagfile` reads back."""
  return "".join(f"--{name}={_text(value)}\n" for name, (value, _) in leaves(config).items())


def summary(config: Any) -> str:
  """The whole tree for people: a line per section."""
  sections: dict[str, list[str]] = {}
  for name, (value, _) in leaves(config).items():
    section, _, leaf = name.rpartition(".")
    sections.setdefault(section or "run", []).append(f"{leaf}={_text(value)}")
  return "\n".join(f"{section:>11}: {' '.join(parts)}" for section, parts in sections.items())


def _text(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def to_json(config: Any) -> dict[str, Any]:
  """The tree as nested dicts."""
  return dataclasses.asdict(config)


def from_json[T](default: T, tree: Mapping[str, Any]) -> T:
  """The tree that `to_json` wrote; leaves that are absent keep the value they have in `default`."""
  if not isinstance(tree, Mapping):
    raise ValueError(f"a configuration is an object of names and values, not {tree!r}")
  known, given = leaves(default), _flatten(tree)
  for name in given:
    if name not in known:
      raise ValueError(unknown("the configuration's", name, known))
  return replace(default, given)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= (
      _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    )
  return flat


def unknown(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
  """One sentence for a misspelt name, with the nearest right one."""
  return f"{what} {name!r} is unknown; {suggest(name, known)}"


@contextmanager
def blame_user(kinds: tuple[type[Exception], ...] = (ValueError, OSError), what: str = ""):
  """Inside this block, errors of these kinds are the user's: they become a `UserError`.

  So do numbers that are too large for the machine, in whatever block. The sentence begins with
  `what`, where the error itself cannot know where it happened.
  """
  try:
    yield
  except (*kinds, OverflowError, MemoryError) as error:
    raise UserError(what + " ".join(str(error).split())) from error


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
  """Runs a program and exits: with its own code, 0 after `--help`, 1 after a `UserError`.

  A `UserError` is one sentence on stderr. Any other exception is a bug and keeps its traceback.
  """
  try:
    code = main(sys.argv)
  except HelpAsked as text:
    print(text)
    code = 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    code = 1
  sys.exit(code or 0)
