"""What all generated tasks share: streams, vocabularies, cards, prompts."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from experiments.tasks import TASKS
from experiments.tasks.task import Generated, Vocabulary, as_record, letters

GENERATED = [name for name in TASKS if name != "bytes"]


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("seq_len", [16, 64])
def test_records(name, seq_len):
  task = TASKS[name](seq_len=seq_len, seed=1)
  for split in (task.train, task.valid):
    for index in (0, 1, 77, len(split) - 1):
      record = split[index]
      assert {key: (value.shape, value.dtype) for key, value in record.items()} == {
        "inputs": ((seq_len,), np.int32),
        "targets": ((seq_len,), np.int32),
        "weights": ((seq_len,), np.float32),
      }
      assert record["weights"].any()
      for key in ("inputs", "targets"):
        assert record[key].min() >= 0 and record[key].max() < task.vocab_size


@pytest.mark.parametrize("name", GENERATED)
def test_a_record_is_a_function_of_seed_split_and_index(name):
  def read(seed, split, index):
    record = getattr(TASKS[name](seq_len=64, seed=seed), split)[index]
    return b"".join(record[key].tobytes() for key in sorted(record))

  places = [
    (seed, split, index) for seed in (0, 1) for split in ("train", "valid") for index in range(8)
  ]
  forward = [read(*place) for place in places]
  assert forward == [read(*place) for place in reversed(places)][::-1]
  assert len(set(forward)) == len(places)


GOLDEN = {
  "copy": "5c66c39c0e4e",
  "selective_copy": "5a50932df833",
  "induction": "ebc56e1a8ce4",
  "recall": "f8fb77a57183",
  "hmm": "424f238f7702",
}


@pytest.mark.parametrize("name", GENERATED)
def test_records_stay_what_they_are(name):
  # Whoever changes a record, numpy included, changes the card's version with it.
  record = TASKS[name](seq_len=64, seed=0).valid[3]
  assert hashlib.sha256(record["targets"].tobytes()).hexdigest()[:12] == GOLDEN[name]


@pytest.mark.parametrize("name", GENERATED)
def test_held_out_records_are_not_in_the_training_split(name):
  task = TASKS[name](seq_len=64, seed=0)
  train = {task.train[i]["inputs"].tobytes() for i in range(500)}
  valid = {task.valid[i]["inputs"].tobytes() for i in range(500)}
  assert len(train) == len(valid) == 500
  assert not train & valid


@pytest.mark.parametrize("name", GENERATED)
def test_people_can_read_and_write_it(name):
  task = TASKS[name](seq_len=16, seed=0)
  tokens = task.valid[0]["inputs"].tolist()
  assert task.encode(task.decode(tokens)) == tokens
  everything = list(range(task.vocab_size))
  assert task.encode(task.decode(everything)) == everything
  with pytest.raises(ValueError, match="'~' is none of the"):
    task.encode("~")


@pytest.mark.parametrize("name", GENERATED)
def test_the_prompt_ends_where_the_first_answer_is_due(name):
  task = TASKS[name](seq_len=32, seed=0)
  record = task.valid[0]
  count = len(task.prompt)
  assert task.prompt == record["inputs"][:count].tolist()
  assert record["weights"][count - 1] == 1.0
  assert not record["weights"][: count - 1].any()


@pytest.mark.parametrize("name", GENERATED)
def test_card(name):
  task = TASKS[name](seq_len=32, seed=0)
  assert task.card.name == task.name == name
  assert json.loads(task.card.to_json())["licence"] == "CC0-1.0"
  others = [TASKS[name](seq_len=34, seed=0), TASKS[name](seq_len=32, seed=1)]
  assert len({task.card.sha256, *(other.card.sha256 for other in others)}) == 3
  assert dataclasses.asdict(task.card) == dataclasses.asdict(TASKS[name](seq_len=32, seed=0).card)


@pytest.mark.parametrize("name", GENERATED)
def test_a_length_that_is_too_short_is_printed_with_the_least(name):
  with pytest.raises(ValueError, match=rf"seq_len for the task {name}.* at least \d+.*, got 0"):
    TASKS[name](seq_len=0, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_fit_no_key(seed):
  with pytest.raises(ValueError, match=rf"seed must lie in .*, got {seed}"):
    TASKS["copy"](seq_len=8, seed=seed)


def test_streams_of_different_keys_differ():
  def draw(random):
    return {"x": random.random(4)}

  streams = [
    Generated(draw, seed, split, 100)[index]["x"].tobytes()
    for seed in (0, 1, 2, 2**62)
    for split in (0, 1)
    for index in (0, 1, 2)
  ]
  assert len(set(streams)) == len(streams)
  with pytest.raises(IndexError):
    Generated(draw, 0, 0, 100)[100]


def test_as_record_shifts_tokens_and_weights():
  record = as_record(np.array([5, 6, 7, 8]), slice(2, 4))
  assert record["inputs"].tolist() == [5, 6, 7]
  assert record["targets"].tolist() == [6, 7, 8]
  assert record["weights"].tolist() == [0.0, 1.0, 1.0]  # 7 and 8 are predicted


def test_letters_and_vocabulary():
  assert letters(28)[24:] == ("y", "z", "s26", "s27")
  assert Vocabulary(("a", "bc")).encode("bc  a\n") == [1, 0]
