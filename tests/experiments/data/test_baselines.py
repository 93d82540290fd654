"""The table's numbers against sums written out, and against sources whose entropy is known."""

import math
import zlib
from collections import Counter

import numpy as np
import pytest

from experiments.data import baselines
from experiments.data.baselines import Baselines, bits_per_byte


def as_bytes(text):
  return np.frombuffer(text, np.uint8)


TRAIN = b"the cat sat on the mat; the dog sat on the log.\n" * 3
VALID = b"a cat and a dog sat on a mat\nzebra"


def test_unigram_and_bigram_by_hand():
  got = bits_per_byte(as_bytes(TRAIN), as_bytes(VALID))
  single = Counter(TRAIN)
  double = Counter(zip(b"\n" + TRAIN[:-1], TRAIN, strict=True))
  context = Counter(b"\n" + TRAIN[:-1])
  unigram = bigram = 0.0
  for before, byte in zip(b"\n" + VALID[:-1], VALID, strict=True):
    unigram -= math.log2((single[byte] + 0.1) / (len(TRAIN) + 25.6))
    bigram -= math.log2((double[before, byte] + 0.1) / (context[before] + 25.6))
  assert got["unigram"] == pytest.approx(unigram / len(VALID), rel=1e-12)
  assert got["bigram"] == pytest.approx(bigram / len(VALID), rel=1e-12)


def test_gzip_is_the_whole_split_in_one_piece():
  got = bits_per_byte(as_bytes(TRAIN), as_bytes(VALID * 50))["gzip"]
  deflate = zlib.compressobj(9, wbits=-15)
  size = len(deflate.compress(VALID * 50) + deflate.flush()) + 10 + 8  # header, checksum and size
  assert got == 8 * size / (len(VALID) * 50)


def test_known_sources():
  random = np.random.default_rng(0)
  noise = random.integers(256, size=200_000).astype(np.uint8)
  got = bits_per_byte(noise[:150_000], noise[150_000:])
  assert got["unigram"] == pytest.approx(8.0, abs=0.01)
  assert got["gzip"] == pytest.approx(8.0, abs=0.01)
  # A walk on a ring of 16, up or down by 1: unigram 4 bits, bigram 1.
  steps = random.choice([-1, 1], size=200_000)
  walk = (np.cumsum(steps) % 16).astype(np.uint8)
  got = bits_per_byte(walk[:150_000], walk[150_000:])
  assert got["unigram"] == pytest.approx(4.0, abs=0.01)
  assert got["bigram"] == pytest.approx(1.0, abs=0.01)


def test_chunks_do_not_show(monkeypatch):
  whole = bits_per_byte(as_bytes(TRAIN), as_bytes(VALID))
  for size in (1, 2, 7, len(VALID) - 1, len(VALID)):
    monkeypatch.setattr(baselines, "_CHUNK", size)
    assert bits_per_byte(as_bytes(TRAIN), as_bytes(VALID)) == whole


def test_nothing_is_counted_until_asked(monkeypatch):
  calls = []
  count = baselines.bits_per_byte
  monkeypatch.setattr(baselines, "bits_per_byte", lambda *texts: calls.append(1) or count(*texts))
  lazy = Baselines(as_bytes(TRAIN), as_bytes(VALID))
  assert (list(lazy), len(lazy), len(calls)) == (["unigram", "bigram", "gzip"], 3, 0)
  assert dict(lazy) == count(as_bytes(TRAIN), as_bytes(VALID))
  assert lazy["gzip"] and len(calls) == 1
  with pytest.raises(KeyError):
    lazy["trigram"]
