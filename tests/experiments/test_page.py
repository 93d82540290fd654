"""Pages: nothing that is given can write markup, and nothing is fetched."""

import html.parser

import pytest

from experiments import page
from experiments.page import Html, element


class Tags(html.parser.HTMLParser):
  """Collects (tag, attributes) and checks that tags are closed in order."""

  void = ("img", "source", "meta")

  def __init__(self, text):
    super().__init__()
    self.found, self.open, self.text = [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag not in self.void:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=\"y\">&amp;"


def test_children_and_attributes_are_escaped():
  text = element("p", HOSTILE, title=HOSTILE)
  tags = Tags(text)
  assert tags.found == [("p", {"title": HOSTILE})]
  assert "".join(tags.text) == HOSTILE


def test_html_is_not_escaped_twice():
  assert element("p", element("b", "1 < 2")) == "<p><b>1 &lt; 2</b></p>"


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("a\x00b", "a\u2400b"),
    ("tab\tline\n", "tab\tline\n"),
    ("\x1b[31m\r", "\u241b[31m\u240d"),
    ("\udc80", "?"),
    ("naïve λ", "naïve λ"),
  ],
)
def test_printable(text, shown):
  assert page.printable(text) == shown
  shown.encode("utf-8")


def test_absent_attributes_and_reserved_words():
  assert element("td", 1.5, class_="number", id=None) == '<td class="number">1.5</td>'


def test_a_document_is_whole_and_fetches_nothing():
  figure = page.picture({"light": b"l", "dark": b"d"}, alt="a > b", caption="c", width=2, height=1)
  text = page.document(HOSTILE, figure, page.rows([(HOSTILE, Html("<b>x</b>"))]))
  assert text.startswith("<!DOCTYPE html>")
  tags = Tags(text.removeprefix("<!DOCTYPE html>"))
  names = [tag for tag, _ in tags.found]
  assert "script" not in names and "link" not in names
  for tag, attributes in tags.found:
    for name in ("src", "srcset", "href"):
      assert attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,"), (
        tag
      )
    assert tag != "img" or attributes["alt"] == "a > b"
  policies = [a for t, a in tags.found if t == "meta" and "http-equiv" in a]
  assert policies[0]["content"].startswith("default-src 'none'")
  assert "url(" not in text and "@import" not in text


def test_a_picture_without_a_dark_one_is_an_image():
  figure = page.picture({"light": b"l"}, alt="a", width=2, height=1)
  assert [tag for tag, _ in Tags(figure).found] == ["figure", "picture", "img"]
