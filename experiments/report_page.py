"""The report's page from its parts: HTML that stands alone, or Markdown without the figures."""

import dataclasses
import html
import re
from collections.abc import Sequence

# Of a table on the page, and of links in a list; trials.csv and report.json have all.
ROWS, _LINKS = 200, 60


@dataclasses.dataclass(frozen=True)
class Ids:
  """A cell, or a line below a figure, that lists trials by id."""

  trials: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of texts and `Ids`.

  Attributes:
    rows: all; the page shows the first `most`.
    anchors: of each row, or empty; a row that has none has "".
    whole: the file that has all rows.
  """

  headers: Sequence[str]
  rows: Sequence[Sequence[str | Ids]]
  anchors: Sequence[str] = ()
  most: int = ROWS
  whole: str = "report.json"


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure, what it shows, and the trials behind it."""

  svg: str
  caption: str
  trials: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading and what stands below it: paragraphs, figures, tables."""

  id: str
  title: str
  blocks: Sequence[str | Table | Plot]


_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --link: #2a6fb5; }
@media (prefers-color-scheme: dark) { :root { --link: #7db4ee; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1160px;
  padding: 0 16px 64px; overflow-wrap: break-word; }
h1 { font-size: 1.6em; } h2 { margin-top: 2.2em; border-bottom: 1px solid var(--line); }
p { max-width: 75ch; } a { color: var(--link); } nav a { margin-right: 1.1em; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr));
  gap: 24px; align-items: start; }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; max-width: 560px; }
figcaption, details, .cut { font-size: .87em; }
.table { overflow: auto; max-height: 75vh; border: 1px solid var(--line); margin: 1em 0; }
table { border-collapse: collapse; font-size: .87em; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--soft); }
td { max-width: 34em; } .n { white-space: nowrap; }
.t { min-width: 15em; } .w { min-width: 24em; }
th { position: sticky; top: 0; background: Canvas; }
tr:target { background: #e9b94a55; }
.ids { font-family: ui-monospace, monospace; font-size: .92em; }
"""


def counted(count: int, noun: str) -> str:
  """`1 trial`, `1,000 trials`."""
  return f"{count:,} {noun}" + ("" if count == 1 else "s")


def to_html(title: str, content: Sequence[Section]) -> str:
  """One page that needs no other file."""
  linked = {
    anchor
    for section in content
    for block in section.blocks
    if isinstance(block, Table)
    for anchor in block.anchors[: block.most]
  }

  def ids(trials: Sequence[str]) -> str:
    links = [
      f'<a href="#t-{each}">{each}</a>' if f"t-{each}" in linked else each
      for each in map(html.escape, trials[:_LINKS])
    ]
    more = len(trials) - len(links)
    return f'<span class="ids">{" ".join(links)}</span>' + (
      f" and {more:,} more: trials.csv" if more else ""
    )

  def cell(value: str | Ids) -> str:
    if isinstance(value, str):
      return html.escape(value)
    if len(value.trials) == 1:
      return ids(value.trials)
    return f"<details><summary>{len(value.trials):,}</summary>{ids(value.trials)}</details>"

  parts = []
  for section in content:
    parts.append(f'<section id="{section.id}"><h2>{html.escape(section.title)}</h2>')
    in_plots = False
    for block in section.blocks:
      if isinstance(block, Plot) != in_plots:
        in_plots = not in_plots
        parts.append('<div class="plots">' if in_plots else "</div>")
      if isinstance(block, str):
        parts.append(f"<p>{html.escape(block)}</p>")
      elif isinstance(block, Plot):
        parts.append(
          f"<figure>{block.svg}<figcaption>{html.escape(block.caption)}</figcaption><details>"
          f"<summary>{counted(len(block.trials), 'trial')} behind it</summary>{ids(block.trials)}"
          "</details>"
          "</figure>"
        )
      else:
        parts.append('<div class="table"><table><thead><tr>')
        parts += [f"<th>{html.escape(each).replace('.', '.<wbr>')}</th>" for each in block.headers]
        parts.append("</tr></thead><tbody>")
        for i, row in enumerate(block.rows[: block.most]):
          anchor = block.anchors[i] if block.anchors else ""
          anchor = f' id="{html.escape(anchor)}"' if anchor else ""
          cells = "".join(f"<td{_kind(each)}>{cell(each)}</td>" for each in row)
          parts.append(f"<tr{anchor}>{cells}</tr>")
        parts.append("</tbody></table></div>")
        parts.append(f'<p class="cut">{_cut(block)}</p>' if _cut(block) else "")
    parts.append("</div></section>" if in_plots else "</section>")
  links = "".join(f'<a href="#{each.id}">{html.escape(each.title)}</a>' for each in content)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
    f"<body><h1>{html.escape(title)}</h1><nav>{links}</nav>\n"
    + "\n".join(parts)
    + "</body></html>\n"
  )


def _kind(value: str | Ids) -> str:
  """Numbers stay on one line; on a phone, where all columns are narrow, long texts are less so."""
  if not isinstance(value, str):
    return ""
  if re.match(r"[−\-\d]", value):
    return ' class="n"'
  return ' class="w"' if len(value) > 60 else ' class="t"' if len(value) > 20 else ""


def _cut(table: Table) -> str:
  rows = len(table.rows)
  return "" if rows <= table.most else f"{table.most:,} of {rows:,} rows; all in {table.whole}."


def to_markdown(title: str, content: Sequence[Section]) -> str:
  """The same without the figures."""

  def cell(value: str | Ids) -> str:
    if isinstance(value, Ids):
      more = len(value.trials) - 3
      value = " ".join(value.trials[:3]) + (f" and {more:,} more" if more > 0 else "")
    return re.sub(r"([|*<])", r"\\\1", value).replace("\n", " ")

  lines = [f"# {title}"]
  for section in content:
    lines += ["", f"## {section.title}"]
    for block in section.blocks:
      if isinstance(block, str):
        lines += ["", block]
      elif isinstance(block, Table):
        shown = dataclasses.replace(block, most=min(block.most, ROWS))
        lines += ["", f"| {' | '.join(shown.headers)} |", "| --- " * len(shown.headers) + "|"]
        lines += [f"| {' | '.join(map(cell, row))} |" for row in shown.rows[: shown.most]]
        lines += ["", _cut(shown)] if _cut(shown) else []
  return "\n".join(lines) + "\n"
