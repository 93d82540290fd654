"""The standard library: the right files, on every file system the same, within a second or two."""

import sys

import pytest

from experiments.data import stdlib


@pytest.fixture(scope="module")
def corpus():
  return stdlib.load()


def test_card_says_what_it_is(corpus):
  card = corpus.card
  assert card.licence == "PSF-2.0"
  assert card.version == ".".join(map(str, sys.version_info[:3]))
  assert card.version in card.origin
  assert sys.prefix not in card.to_json()
  assert card.files > 400
  assert card.bytes == card.train_bytes + card.valid_bytes > 8_000_000
  assert (corpus.train.size, corpus.valid.size) == (card.train_bytes, card.valid_bytes)
  assert card.split.startswith("by file")
  assert 0.07 < card.valid_bytes / card.bytes < 0.14


def test_it_is_source_and_no_test(corpus):
  text = corpus.train.tobytes() + corpus.valid.tobytes()
  assert b"class ArgumentParser" in text
  assert b"class LoggerAdapter" in text
  assert b"build_time_vars = {" not in text  # _sysconfigdata: this machine's build settings


def lay_out(root, names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode() * 20)


KEPT = ["os.py", "json/decoder.py", "email/mime/text.py", "idlelib/config.py", "lib2to3/main.py"]
LEFT = [
  "test/test_os.py",
  "json/tests/test_x.py",
  "idlelib/idle_test/test_y.py",
  "site-packages/numpy/core.py",
  "dist-packages/apt.py",
  "__pycache__/os.py",
  "ensurepip/_bundled/pip.py",
  "sitecustomize.py",
  "_sysconfigdata__linux.py",
  "config-3.12/python-config.py",
  "json/data.json",
]


def test_what_is_kept_and_what_is_left(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "stdlib_module_names", sys.stdlib_module_names | {"lib2to3"})
  lay_out(tmp_path / "one", KEPT + LEFT)
  lay_out(tmp_path / "two", sorted(KEPT, reverse=True))
  one, two = stdlib.load(root=tmp_path / "one"), stdlib.load(root=tmp_path / "two")
  assert one.card == two.card
  assert one.card.files == len(KEPT)
  assert one.train.tobytes() == two.train.tobytes()


def test_a_python_without_source_is_told(tmp_path):
  with pytest.raises(ValueError, match=r"without the source .* --data\.path"):
    stdlib.load(root=tmp_path)


def test_unreadable_source_is_named(tmp_path):
  lay_out(tmp_path, ["os.py"])
  (tmp_path / "json").mkdir()
  (tmp_path / "json" / "decoder.py").symlink_to("nowhere.py")
  with pytest.raises(ValueError, match=r"cannot read 'json/decoder.py' .* No such file"):
    stdlib.load(root=tmp_path)
