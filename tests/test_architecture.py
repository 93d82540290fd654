"""The drawing of the house, read by `ast`: who imports whom, and what every file owes its reader.

    notebooks -> experiments -> attention.variants -> attention.modules -> attention.ops
    attention.ops -> pallas_kernels -> jax                flax only in attention.modules
    attention.ops -> masks, scores, online_softmax, feature_maps, positions -> types

Imports inside functions count. The one exception is `attention.__getattr__`, which may name the
upper layers because it runs only when somebody asks for them.
"""

import ast
import functools
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("attention", "pallas_kernels", "experiments")
SIZE_FILE, SIZE_FUNCTION = 600, 60


class Import(NamedTuple):
  """One imported module: its dotted name, what binds it, its line, and the function around it."""

  module: str
  bound: str
  line: int
  inside: str | None


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def modules() -> dict[str, pathlib.Path]:
  """Dotted name -> file, for every module of the three packages."""
  found = {}
  for package in PACKAGES:
    for path in sorted((ROOT / package).rglob("*.py")):
      parts = path.relative_to(ROOT).with_suffix("").parts
      found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


def python_files() -> list[pathlib.Path]:
  """Every Python file that we wrote."""
  return [path for top in (*PACKAGES, "tests") for path in sorted((ROOT / top).rglob("*.py"))]


def base_of(node: ast.ImportFrom, name: str, is_package: bool) -> str:
  """The module that `from .x import y`, written in module `name`, means by `.x`."""
  if not node.level:
    return node.module or ""
  parts = name.split(".")
  above = parts[: len(parts) - node.level + is_package]
  return ".".join([*above, node.module] if node.module else above)


def imports_in(tree: ast.AST, name: str, is_package: bool) -> Iterator[Import]:
  """Every import at any depth; `from a import b` is a.b if that is one of our modules, else a."""

  def visit(node: ast.AST, inside: str | None) -> Iterator[Import]:
    if isinstance(node, ast.Import):
      for alias in node.names:
        bound = alias.asname or alias.name.split(".")[0]
        yield Import(alias.name, bound, node.lineno, inside)
    elif isinstance(node, ast.ImportFrom):
      base = base_of(node, name, is_package)
      for alias in node.names:
        full = f"{base}.{alias.name}"
        module = full if full in modules() or base == "jax" else base
        yield Import(module, alias.asname or alias.name, node.lineno, inside)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      inside = node.name
    for child in ast.iter_child_nodes(node):
      yield from visit(child, inside)

  return visit(tree, None)


@functools.cache
def imports(name: str) -> tuple[Import, ...]:
  """The imports of one of our modules."""
  path = modules()[name]
  return tuple(imports_in(parse(path), name, path.name == "__init__.py"))


def is_lazy_door(name: str, item: Import) -> bool:
  """Whether this is the public package's `__getattr__`, which loads upper layers when asked."""
  return name == "attention" and item.inside == "__getattr__"


# A layer, by the names of its modules (the first match counts); then what each layer may import.
LAYERS = {
  "pallas_kernels": r"pallas_kernels(\..+)?",
  "types": r"attention\.types",
  "ops": r"attention\.ops(\..+)?",
  "modules": r"attention\.modules(\..+)?",
  "variants": r"attention\.variants",
  "attention": r"attention",
  "shared": r"attention\.[a-z_]+",  # masks, scores, feature_maps...: whatever two mechanisms share
  "experiments": r"experiments(\..+)?",
}
MAY_IMPORT = {
  "pallas_kernels": {"pallas_kernels"},
  "types": set(),
  "shared": {"pallas_kernels", "shared", "types"},
  "ops": {"pallas_kernels", "shared", "types"},
  "modules": {"modules", "ops", "shared", "types"},
  "variants": {"modules", "ops", "shared", "types"},
  "attention": {"ops", "shared", "types"},
  "experiments": {
    *("experiments", "attention", "variants", "modules", "ops", "shared", "types"),
    "pallas_kernels",  # what compiles for absent chips, and how that is asked for
  },
}
FAST = ("attention.online_softmax", "attention.tiled", "pallas_kernels")
NUMERICS = {"jax", "jaxtyping", "numpy"}
EXPERIMENTS_ONLY = {"absl", "grain", "matplotlib", "optax", "orbax", "rich", "tensorboardX"}
ELSEWHERE = dict.fromkeys(MAY_IMPORT, NUMERICS) | {
  "modules": NUMERICS | {"flax"},
  "experiments": NUMERICS | {"flax", "tokamax", "torch"} | EXPERIMENTS_ONLY,
}


def layer_of(name: str) -> str:
  for layer, pattern in LAYERS.items():
    if re.fullmatch(pattern, name):
      return layer
  raise AssertionError(f"{name} is in no layer: say in tests/test_architecture.py where it belongs")


def owner(module: str) -> str | None:
  """The longest prefix of a dotted name that is one of our modules."""
  parts = module.split(".")
  candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
  return next((name for name in candidates if name in modules()), None)


def place(path: pathlib.Path, line: int) -> str:
  return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("name", modules())
def test_imports_run_one_way(name):
  """A module imports only what its layer may, ours and others'."""
  layer, wrong = layer_of(name), []
  for item in imports(name):
    ours, top = owner(item.module), item.module.split(".")[0]
    where = place(modules()[name], item.line)
    if ours:
      allowed = layer_of(ours) in MAY_IMPORT[layer] or is_lazy_door(name, item)
    else:
      allowed = top in sys.stdlib_module_names or top in ELSEWHERE[layer]
    if not allowed:
      wrong.append(f"{where}: {layer} may not import {item.module}")
  assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle():
  """Among all modules, lazy imports included, following an import never leads back."""
  graph: dict[str, set[str]] = {}
  for name in modules():
    targets = (owner(item.module) for item in imports(name) if not is_lazy_door(name, item))
    graph[name] = {target for target in targets if target and target != name}
  done: set[str] = set()

  def walk(name: str, path: tuple[str, ...]) -> None:
    assert name not in path, " -> ".join((*path[path.index(name) :], name))
    if name not in done:
      for target in sorted(graph[name]):
        walk(target, (*path, name))
      done.add(name)

  for name in graph:
    walk(name, ())


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_forbidden_words(path):
  """No private jax, no swallowed ImportError, no `global`, no promise to finish later."""
  tree, wrong = parse(path), []
  for item in imports_in(tree, "", False):
    if item.module.startswith("jax._src") or item.module == "__future__":
      wrong.append(f"{place(path, item.line)}: imports {item.module}")
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and node.attr == "_src":
      wrong.append(f"{place(path, node.lineno)}: reaches into jax._src")
    if isinstance(node, ast.Global):
      wrong.append(f"{place(path, node.lineno)}: module-level state by `global`")
    if isinstance(node, ast.ExceptHandler) and swallows_import_error(node):
      wrong.append(f"{place(path, node.lineno)}: swallows an ImportError")
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    if re.search(r"#.*\b(TO" r"DO|FIX" r"ME)\b", line):
      wrong.append(f"{place(path, number)}: says it is unfinished")
  assert not wrong, "\n".join(wrong)


def span(node: ast.stmt) -> int:
  return (node.end_lineno or node.lineno) - node.lineno + 1


def swallows_import_error(node: ast.ExceptHandler) -> bool:
  caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else set()
  return bool(caught & {"ImportError", "ModuleNotFoundError"}) and all(
    isinstance(statement, ast.Pass) for statement in node.body
  )


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_size_budget(path):
  """A file is read in one sitting, and a function, without its docstring, on one screen."""
  lines = len(path.read_text(encoding="utf-8").splitlines())
  assert lines <= SIZE_FILE, f"{path.relative_to(ROOT)} has {lines} lines, more than {SIZE_FILE}"
  for node in ast.walk(parse(path)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      size = span(node) - (span(node.body[0]) if ast.get_docstring(node) else 0)
      assert size <= SIZE_FUNCTION, (
        f"{place(path, node.lineno)}: {node.name} has {size} lines, more than {SIZE_FUNCTION}"
      )


def ops_files() -> list[str]:
  return [name for name in modules() if name.startswith("attention.ops.")]


def top_functions(name: str) -> dict[str, ast.FunctionDef]:
  return {n.name: n for n in parse(modules()[name]).body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("name", ops_files())
def test_an_op_is_complete(name):
  """An ops file has an equation, a source, a reference and a test file."""
  doc = ast.get_docstring(parse(modules()[name]), clean=False) or ""
  assert re.search(r"https?://", doc), f"{name}: the module docstring names no source (http...)"
  assert re.search(r"^ {2,}.*\S +=", doc, re.MULTILINE), (
    f"{name}: the module docstring shows no equation (an indented line with =)"
  )
  assert "reference" in top_functions(name), f"{name} has no function `reference`"
  test = ROOT / "tests/attention/ops" / f"test_{name.split('.')[-1]}.py"
  assert test.exists(), f"{name} has no {test.relative_to(ROOT)}"


@pytest.mark.parametrize("name", ops_files())
def test_a_reference_shares_no_code_with_what_it_checks(name):
  """Nothing that `reference` reaches within its file comes from a fast form."""
  fast = {item.bound for item in imports(name) if item.module.startswith(FAST)}
  functions, reached, waiting = top_functions(name), set(), ["reference"]
  while waiting:
    for node in ast.walk(functions[waiting.pop()]):
      if isinstance(node, ast.Name) and node.id not in reached:
        reached.add(node.id)
        waiting += [node.id] if node.id in functions else []
  assert not reached & fast, f"{name}: reference uses {sorted(reached & fast)}"


def test_every_op_is_in_variants():
  """VARIANTS is one literal dict, and every ops file is the home of an entry's reference."""
  tree = parse(modules()["attention.variants"])
  tables = [
    node.value
    for node in tree.body
    if isinstance(node, ast.Assign | ast.AnnAssign) and "VARIANTS" in names_assigned(node)
  ]
  assert len(tables) == 1 and isinstance(tables[0], ast.Dict), "VARIANTS is not one literal dict"
  from attention.variants import VARIANTS

  homes = {home(variant.reference) for variant in VARIANTS.values()}
  missing = set(ops_files()) - homes
  assert not missing, f"no entry of VARIANTS has its reference in {sorted(missing)}"


def names_assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
  targets = node.targets if isinstance(node, ast.Assign) else [node.target]
  return {target.id for target in targets if isinstance(target, ast.Name)}


def home(function: Callable) -> str:
  """The module that wrote a function, seen through partial applications and wrappers."""
  while isinstance(function, functools.partial):
    function = function.func
  return inspect.unwrap(function).__module__


def test_tests_mirror_the_tree():
  """tests/a/test_b*.py is about a/b.py or a/b/, and only experiments may have an untested file."""
  tested, stray = set(), []
  for path in sorted((ROOT / "tests").rglob("test_*.py")):
    folder = path.relative_to(ROOT / "tests").parent
    if folder == pathlib.Path("."):
      continue  # the whole house: architecture, README, notebooks
    words = path.stem.removeprefix("test_").split("_")
    stems = ["_".join(words[:end]) for end in range(len(words), 0, -1)]
    names = [".".join((*folder.parts, stem)).removesuffix(".init") for stem in stems]
    subject = next((name for name in names if name in modules()), None)
    tested.add(subject)
    stray += [] if subject else [str(path.relative_to(ROOT))]
  assert not stray, f"these test files mirror no source file: {stray}"
  owed = {n for n, p in modules().items() if not n.startswith("experiments") and has_code(p)}
  assert not owed - tested, f"no test file mirrors {sorted(owed - tested)}"


def has_code(path: pathlib.Path) -> bool:
  """Whether a file defines a function, so that there is something to test."""
  return path.name != "__init__.py" and any(
    isinstance(node, ast.FunctionDef) for node in ast.walk(parse(path))
  )


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_define_nothing(path):
  """A notebook imports and shows. What is worth defining is worth a file and a test."""
  for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
    if cell["cell_type"] != "code":
      continue
    source = "".join(cell["source"])
    code = "\n".join(line for line in source.splitlines() if line.lstrip()[:1] not in ("%", "!"))
    for node in ast.walk(ast.parse(code)):
      assert not isinstance(node, ast.FunctionDef | ast.ClassDef), (
        f"{path.name} defines {getattr(node, 'name', '')}"
      )


def fresh(code: str, **environment: str) -> str:
  """What a new interpreter prints."""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_import_attention_is_light():
  """`import attention` loads jax and numerics, and neither flax nor anything of the experiments."""
  loaded = json.loads(fresh("import attention, json, sys; print(json.dumps(sorted(sys.modules)))"))
  heavy = EXPERIMENTS_ONLY | {"flax", "experiments"}
  assert not heavy & {name.split(".")[0] for name in loaded}
  assert not {"attention.variants", "attention.modules"} & set(loaded)


def test_import_attention_costs_no_more_than_jax_and_a_third(tmp_path):
  """Both in one interpreter, in processor time: what else the machine does falls on both.

  The best of several interpreters, and of compiled sources, as a user's second import has them: the
  first one compiles JAX's and ours into a folder of their own, which any checkout may write to.
  """
  compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
  code = """
from time import process_time
start = process_time(); import jax; jax_is_there = process_time(); import attention
print((process_time() - start) / (jax_is_there - start))
"""
  fresh(code, **compiled)
  ratios = []
  while len(ratios) < 12 and min(ratios, default=2.0) > 1.3:
    ratios.append(float(fresh(code, **compiled)))
  assert min(ratios) <= 1.3, f"import attention costs {ratios} times import jax"
