"""Does the split depend on anything but names and contents, and does it lose or leak a byte?"""

import random

import pytest

from experiments.data.corpus import Document, build


def make(documents, fraction=0.1, version=None):
  return build(
    documents,
    valid_fraction=fraction,
    name="x",
    description="d",
    licence="CC0-1.0",
    origin="here",
    version=version,
  )


def many(count=200, seed=0):
  draw = random.Random(seed)
  return [Document(f"d{i % 7}/f{i}", draw.randbytes(draw.randrange(50, 150))) for i in range(count)]


def test_order_of_documents_does_not_matter():
  documents = many()
  forward, backward = make(documents), make(documents[::-1])
  assert forward.card == backward.card
  assert forward.train.tobytes() == backward.train.tobytes()
  assert forward.valid.tobytes() == backward.valid.tobytes()


def test_each_document_is_on_one_side_whole():
  corpus = make(many(), fraction=0.2)
  train, valid = corpus.train.tobytes(), corpus.valid.tobytes()
  sides = [(document.data in train, document.data in valid) for document in many()]
  assert set(sides) == {(True, False), (False, True)}
  assert corpus.card.split.startswith("by file")
  total = sum(len(document.data) for document in many())
  assert (corpus.card.files, corpus.card.bytes) == (200, total)
  assert corpus.card.train_bytes + corpus.card.valid_bytes == total == len(train) + len(valid)
  assert 0.1 < corpus.card.valid_bytes / total < 0.4


def test_a_new_document_moves_no_other():
  before = make(many(), fraction=0.2).valid.tobytes()
  after = make([*many(), Document("a new one", b"!" * 97)], fraction=0.2).valid.tobytes()
  assert after.replace(b"!" * 97, b"") == before


def test_duplicates_are_out_before_the_split():
  documents = many()
  copies = [Document(f"copy/of/{name}", data) for name, data in documents]
  corpus = make(documents + copies, fraction=0.3)
  assert corpus.card.files == 200
  train, valid = corpus.train.tobytes(), corpus.valid.tobytes()
  assert not any(document.data in train and document.data in valid for document in documents)


@pytest.mark.parametrize(
  ("documents", "fraction"),
  [
    ([1000], 0.2),
    ([500, 500, 1], 0.2),
    ([100_000, 10, 10, 10, 10], 0.2),
    ([500, 400, 300], 0.6),  # by name all three are held out, and none would be left
  ],
)
def test_few_or_uneven_documents_lose_their_ends(documents, fraction):
  draw = random.Random(1)
  texts = [Document(f"{i}", draw.randbytes(size)) for i, size in enumerate(documents)]
  corpus = make(texts, fraction=fraction)
  assert corpus.card.split.startswith("by position")
  train, valid = corpus.train.tobytes(), corpus.valid.tobytes()
  assert len(valid) == pytest.approx(fraction * sum(documents), abs=len(documents))
  for _, data in texts:
    cut = len(data) - round(len(data) * fraction)
    assert data[:cut] in train
    assert data[cut:] in valid


def test_the_hash_sees_names_contents_and_boundaries():
  texts = [
    [Document("a", b"xy"), Document("b", b"z")],
    [Document("a", b"x"), Document("b", b"yz")],
    [Document("a", b"xy"), Document("c", b"z")],
    [Document("a", b"xy"), Document("b", b"!")],
  ]
  hashes = {make(documents).card.sha256 for documents in texts}
  assert len(hashes) == len(texts)
  assert make(texts[0]).card.version == make(texts[0]).card.sha256[:12]
  assert make(texts[0], version="7").card.version == "7"


def test_names_that_are_no_utf8_pass():
  assert make([Document("caf\udce9", b"text" * 50)]).card.files == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fraction_must_leave_both_sides(fraction):
  with pytest.raises(ValueError, match="valid_fraction must lie between 0 and 1, got"):
    make(many(), fraction=fraction)


def test_no_text_is_refused():
  with pytest.raises(ValueError, match="every document is empty"):
    make([Document("a", b"")])
