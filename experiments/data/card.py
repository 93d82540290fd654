"""The data card: what a run was trained on, in a form that can be kept beside its results."""

import dataclasses
import json


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataCard:
  """What the data is, where it comes from, who allows its use, and how it was split.

  Attributes:
    name: Short name, e.g. "stdlib".
    description: One or two sentences.
    licence: SPDX identifier; "NOASSERTION" when nobody has said.
    origin: Where it was taken from, in words; never a path of the machine.
    sha256: Hash of the documents (names, sizes and contents), or of the generator's parameters.
    files: Number of documents after exact duplicates are removed; 0 for generated data.
    bytes: Size of the documents together; 0 for generated data.
    train_bytes: Size of the training split.
    valid_bytes: Size of the held-out split.
    split: The rule that decided what is held out.
    version: Version of the origin.
  """

  name: str
  description: str
  licence: str
  origin: str
  sha256: str
  files: int
  bytes: int
  train_bytes: int
  valid_bytes: int
  split: str
  version: str

  def to_json(self) -> str:
    """The card as JSON text, one field per line, in the order of the class."""
    return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
