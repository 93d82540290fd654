"""HTML by hand: elements that escape what they are given, and the one style sheet of every page.

A page is self-contained: no script, no font, no address that is fetched; its policy forbids all of
them. Text reaches it only through `element`, which escapes every string that is not already `Html`,
so a data set cannot write markup.
"""

import base64
import html
from collections.abc import Iterable, Mapping

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1d2430; --muted:
  #5c6677; --line: #e2e6ec;
  --accent: #1f5fb4; --bar: #c9d3e2; --code: #f2f4f7; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e4e8ee;
  --muted: #98a2b3;
  --line: #2a313c; --accent: #7db4ff; --bar: #39434f; --code: #0f141b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55; overflow-wrap:
  anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans",
  Arial, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.6rem; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 0.8rem; letter-spacing: -0.005em; }
h3 { font-size: 0.8rem; margin: 1.4rem 0 0.3rem; color: var(--muted); font-weight: 600; }
p { margin: 0 0 0.8rem; }
.lead { font-size: 1.08rem; color: var(--muted); max-width: 44rem; text-wrap: pretty; }
.lead strong { color: var(--ink); font-weight: 600; }
.note { color: var(--muted); font-size: 0.88rem; }
.alert { margin: 1rem 0 0; border-left: 4px solid #c4521b; padding: 0.5rem 0.9rem; background:
  var(--card);
  border-radius: 0 8px 8px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.4rem, 1fr)); gap: 0.75rem;
  margin: 1.6rem 0 0;
  padding: 0; }
.facts div, figure, .sheet { background: var(--card); border: 1px solid var(--line); border-radius:
  10px; }
.facts div { padding: 0.75rem 0.9rem; display: flex; flex-direction: column-reverse;
  justify-content: flex-end; }
.facts dt { color: var(--muted); font-size: 0.8rem; line-height: 1.3; }
.facts dd { margin: 0; font-size: 1.3rem; white-space: nowrap; font-weight: 600; line-height: 1.25;
  letter-spacing:
  -0.01em;
  font-variant-numeric: tabular-nums; }
.facts .first dd { color: var(--accent); }
figure { margin: 0; padding: 0.7rem; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
figure + figure { margin-top: 0.75rem; }
.pair figure { margin: 0; }
figcaption { color: var(--muted); font-size: 0.85rem; padding: 0.5rem 0.3rem 0.1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap:
  0.75rem; }
.sheet { padding: 0.3rem 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { text-align: left; padding: 0.42rem 0.8rem 0.42rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top;
  font-weight: 400; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-size: 0.8rem; }
tbody th { color: var(--muted); width: 38%; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 6rem; }
.ours > * { font-weight: 650; color: var(--ink); }
.compare tbody th { width: auto; color: inherit; }
.compare { margin-top: 0.75rem; }
.compare small { display: block; color: var(--muted); font-size: 0.8rem; font-weight: 400; }
.compare td { vertical-align: middle; }
.compare .room { width: 45%; padding-right: 0; vertical-align: middle; }
.bar { height: 0.7rem; border-radius: 3px; background: var(--bar); min-width: 2px; }
.ours .bar { background: var(--accent); }
pre, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono",
  monospace; }
code { font-size: 0.9em; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem
  1rem; margin: 0 0 0.8rem;
  font-size: 0.84rem; line-height: 1.5; overflow-x: auto; white-space: pre-wrap; tab-size: 4; }
.commands { white-space: pre; }
.commands .remark { color: var(--muted); }
pre .prompt { color: var(--accent); font-weight: 600; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; color: var(--muted); font-size: 0.9rem; margin-bottom: 0.4rem; }
footer { margin-top: 3rem; color: var(--muted); font-size: 0.82rem; }
@media (max-width: 34rem) { main { padding: 1.5rem 0.9rem 3rem; } h1 { font-size: 1.45rem; }
  .compare { margin-top: 0.75rem; }
.compare small { display: block; color: var(--muted); font-size: 0.8rem; font-weight: 400; }
.compare td { vertical-align: middle; }
.compare .room { width: 28%; }
  figure { padding: 0.4rem; } tbody th { width: 44%; } }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
  """Text that is markup already, and safe."""

  __slots__ = ()


def printable(text: str) -> str:
  """Text that any page may hold: control characters as their pictures, lone surrogates as `?`."""
  text = text.encode("utf-8", "replace").decode("utf-8")
  return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)


def escape(text: object) -> Html:
  """Any value as safe markup; `Html` stays as it is."""
  if isinstance(text, Html):
    return text
  return Html(html.escape(printable(str(text)), quote=True))


def element(tag: str, *children: object, **attributes: object) -> Html:
  """`<tag attributes>children</tag>`, everything escaped; `class_` writes the attribute `class`."""
  given = {name.rstrip("_"): value for name, value in attributes.items() if value is not None}
  written = "".join(f' {name}="{escape(value)}"' for name, value in given.items())
  if tag in ("img", "source", "meta"):
    return Html(f"<{tag}{written}>")
  return Html(f"<{tag}{written}>{''.join(escape(child) for child in children)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
  """The parts one after the other, each on a line of its own."""
  return Html("\n".join(escape(part) for part in parts))


def picture(
  images: Mapping[str, bytes], *, alt: str, caption: object = "", width: int, height: int
) -> Html:
  """A figure from PNG bytes; of `light` and `dark` the reader's color scheme chooses."""
  size = {"width": width, "height": height}
  sources = [element("img", src=_data(images["light"]), alt=alt, **size)]
  if "dark" in images:
    dark = {"media": "(prefers-color-scheme: dark)", "srcset": _data(images["dark"])}
    sources.insert(0, element("source", **dark, **size))
  children = [element("picture", *sources)]
  if caption:
    children.append(element("figcaption", caption))
  return element("figure", *children)


def rows(pairs: Iterable[tuple[object, object]]) -> Html:
  """A two-column table: what, and its value."""
  body = [
    element("tr", element("th", name, scope="row"), element("td", value)) for name, value in pairs
  ]
  return element("div", element("table", element("tbody", *body)), class_="sheet")


def document(title: str, *body: object) -> str:
  """The whole page."""
  head = (
    element("meta", charset="utf-8"),
    element("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
    element("meta", name="viewport", content="width=device-width, initial-scale=1"),
    element("meta", name="color-scheme", content="light dark"),
    element("title", title),
    Html(f"<style>{STYLE}</style>"),
  )
  content = element("body", element("main", join(body)))
  page = element("html", element("head", *head), "\n", content, lang="en")
  return f"<!DOCTYPE html>\n{page}\n"


def _data(image: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
