"""What was there stays there until what comes is whole."""

import json
import os
import pathlib

import pytest

from experiments import files


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / "new folder" / "results.json"
  files.write_results(path, {"a": [1]})
  assert json.loads(path.read_text()) == {"a": [1]}

  def full(self, content):
    with self.open("wb") as file:
      file.write(content[:3])
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_bytes", full)
  with pytest.raises(OSError, match="No space"):
    files.write_results(path, {"a": [2]})
  assert json.loads(path.read_text()) == {"a": [1]} and os.listdir(path.parent) == [path.name]
  monkeypatch.undo()
  files.write_results(path, {"a": [2]})
  assert json.loads(path.read_text()) == {"a": [2]} and os.listdir(path.parent) == [path.name]
