"""One's own files: the right ones, and one sentence for each thing that can be wrong."""

import os
from pathlib import Path

import pytest

from experiments.data import files


@pytest.fixture
def folder(tmp_path):
  for i in range(3):
    (tmp_path / f"{i}.txt").write_bytes(f"text number {i}. ".encode() * 20)
  (tmp_path / "deep" / "er").mkdir(parents=True)
  (tmp_path / "deep" / "er" / "3.txt").write_bytes(b"a deep text. " * 20)
  (tmp_path / "note.md").write_bytes(b"# a note " * 20)
  return tmp_path


@pytest.mark.parametrize(
  ("pattern", "count"), [("0.txt", 1), ("*.txt", 3), ("**/*.txt", 4), ("**", 5), ("[01].txt", 2)]
)
def test_patterns(folder, pattern, count):
  card = files.load(f"{folder}/{pattern}").card
  assert card.files == count
  assert card.licence == "NOASSERTION"
  assert str(folder) not in card.to_json()


def test_home_and_relative_paths(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder))
  monkeypatch.chdir(folder / "deep")
  cards = [files.load(p).card for p in ("~/*.txt", "../*.txt", f"{folder}/*.txt")]
  assert cards[0].sha256 == cards[1].sha256 == cards[2].sha256


def test_a_moved_folder_is_the_same_data(folder, tmp_path_factory):
  before = files.load(f"{folder}/**/*.txt")
  moved = tmp_path_factory.mktemp("elsewhere") / "new name"
  folder.rename(moved)
  after = files.load(f"{moved}/**/*.txt")
  assert before.card == after.card
  assert before.valid.tobytes() == after.valid.tobytes()


def test_a_name_with_brackets_is_a_name(tmp_path):
  (tmp_path / "data[1].txt").write_bytes(b"text " * 50)
  assert files.load(str(tmp_path / "data[1].txt")).card.files == 1


def test_a_single_file_loses_its_end(folder):
  corpus = files.load(f"{folder}/0.txt", valid_fraction=0.25)
  assert corpus.card.split.startswith("by position")
  assert corpus.train.tobytes() + corpus.valid.tobytes() == (folder / "0.txt").read_bytes()


def test_empty_files_among_others_are_skipped(folder):
  (folder / "4.txt").touch()
  assert files.load(f"{folder}/*.txt").card.files == 3


def sentence(call):
  with pytest.raises(ValueError) as caught:
    call()
  text = str(caught.value)
  assert "\n" not in text
  assert "data.path" in text
  return text


def test_no_match(folder):
  assert "matches no file" in sentence(lambda: files.load(f"{folder}/*.rst"))
  assert "matches no file" in sentence(lambda: files.load("~nobody-of-this-name/x"))


def test_folder(folder):
  assert f"{folder}/deep/**/*.txt" in sentence(lambda: files.load(f"{folder}/deep"))


def test_empty(folder):
  (folder / "void").touch()
  (folder / "void2").touch()
  assert "void' is empty" in sentence(lambda: files.load(f"{folder}/void"))
  assert "void' (and 1 more) is empty" in sentence(lambda: files.load(f"{folder}/void*"))


def test_not_a_regular_file(folder):
  os.mkfifo(folder / "pipe")
  assert "is not a regular file" in sentence(lambda: files.load(f"{folder}/pipe"))
  (folder / "gone").symlink_to("nowhere")
  assert "is not a regular file" in sentence(lambda: files.load(f"{folder}/gone"))


def test_unreadable(folder, monkeypatch):
  read = Path.read_bytes

  def refuse(path):
    if path.name == "1.txt":
      raise PermissionError(13, "Permission denied", str(path))
    return read(path)

  monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read anything, so chmod would not do
  text = sentence(lambda: files.load(f"{folder}/*.txt"))
  assert "1.txt'" in text
  assert "Permission denied" in text
