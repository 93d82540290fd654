"""The card survives JSON, and keeps its order."""

import json

from experiments.data.card import DataCard


def test_json_holds_every_field_in_order():
  card = DataCard(
    name="n",
    description="Fünf Wörter",
    licence="PSF-2.0",
    origin="o",
    sha256="0" * 64,
    files=3,
    bytes=30,
    train_bytes=20,
    valid_bytes=10,
    split="by file",
    version="1",
  )
  read = json.loads(card.to_json())
  assert DataCard(**read) == card
  assert list(read)[:3] == ["name", "description", "licence"]
  assert "Fünf" in card.to_json()
