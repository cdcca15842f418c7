"""Reports as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from vla_core.inspect.report import Picture, Report, Section, Table, is_number, overview

LONG = 20  # rows of a table that is folded up

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{margin-bottom:0} h2{margin:2rem 0 .3rem} h3{margin:1.6rem 0 .3rem;font-size:1.1rem}
.kind{color:#777;font-weight:400} .path{color:#555;word-break:break-all;margin:.1rem 0 1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.8rem;margin:1rem 0}
.tile{background:#f3f5f7;border-radius:.5rem;padding:.7rem .9rem;overflow-wrap:anywhere}
.tile b{display:block;font-size:1.35rem;line-height:1.3} summary{color:#0072b2;cursor:pointer;margin:.3rem 0}
.tile span{color:#555;font-size:.9rem}
.warnings{background:#fff6e0;border-left:.3rem solid #e69f00;border-radius:.3rem;padding:.5rem 1rem;margin:1rem 0}
.warnings ul{margin:.2rem 0;padding-left:1.2rem} .fine{background:#e9f6f1;border-color:#009e73}
.wide{overflow-x:auto} img{max-width:100%} figure{margin:.6rem 0} figcaption{color:#555;font-size:.9rem}
table{border-collapse:collapse;font-size:.92rem}
td,th{padding:.18rem .7rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
th{color:#555;font-weight:600} .n{text-align:right;font-variant-numeric:tabular-nums}
td.prose{white-space:normal;min-width:12rem} .note{color:#555;margin:.2rem 0 .5rem} a{color:#0072b2}
.doubt{background:#fff6e0} article+article{border-top:2px solid #ddd;margin-top:3rem}
"""


def page(reports: Sequence[Report]) -> str:
    """The page of one report, or of several with an overview first."""
    title = reports[0].path if len(reports) == 1 else f"{len(reports)} inspected"
    head = "" if len(reports) == 1 else f"<h1>Overview</h1>{_overview(reports)}"
    articles = "".join(_article(report, i) for i, report in enumerate(reports))
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>{head}{articles}</html>\n"
    )


def _overview(reports: Sequence[Report]) -> str:
    table = overview(reports)
    warned = sum(bool(report.warnings) for report in reports)
    note = f"<p class=note>{warned} of {len(reports)} have warnings.</p>"
    rows = "".join(
        f"<tr{' class=doubt' if reports[i].warnings else ''}>{_cells(row[:1])}"
        f"<td><a href=#r{i}>{html.escape(row[1])}</a>{_cells(row[2:])}"
        for i, row in enumerate(table.rows)
    )
    return f"{note}<div class=wide><table><tr>{_head(table)}{rows}</table></div>"


def _article(report: Report, place: int) -> str:
    name = report.path.rstrip("/").rpartition("/")[2] or report.path
    tiles = "".join(
        f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
        for value, label in report.tiles
    )
    if report.warnings:
        items = "".join(f"<li>{html.escape(line)}" for line in report.warnings)
        warnings = f"<div class=warnings><b>Warnings</b><ul>{items}</ul></div>"
    else:
        warnings = '<div class="warnings fine"><b>No warnings</b></div>'
    sections = "".join(map(_section, report.sections))
    return (
        f"<article id=r{place}><h1><span class=kind>{report.kind}</span> {html.escape(name)}</h1>"
        f"<div class=path>{html.escape(report.path)}</div><p>{html.escape(report.summary)}</p>"
        f"<div class=tiles>{tiles}</div>{warnings}{sections}</article>"
    )


def _section(section: Section) -> str:
    note = f"<p class=note>{html.escape(section.note)}</p>" if section.note else ""
    table = f"<div class=wide>{_table(section.table)}</div>" if section.table else ""
    pictures = "".join(map(_picture, section.pictures))
    if section.table and len(section.table.rows) > LONG:
        table = f"<details><summary>Table of {len(section.table.rows)} rows</summary>{table}</details>"
        table, pictures = pictures, table
    return f"<h2>{html.escape(section.title)}</h2>{note}{table}{pictures}"


def _table(table: Table) -> str:
    rows = "".join(f"<tr>{_cells(row)}" for row in table.rows)
    return f"<table><tr>{_head(table)}{rows}</table>"


def _head(table: Table) -> str:
    right = [bool(table.rows) and all(is_number(row[i]) for row in table.rows) for i in range(len(table.head))]
    return "".join(f"<th{' class=n' * end}>{html.escape(name)}" for name, end in zip(table.head, right, strict=True))


def _cells(row: Sequence[str]) -> str:
    return "".join(f"<td{_kind(cell)}>{html.escape(cell)}" for cell in row)


def _kind(cell: str) -> str:
    return " class=n" if is_number(cell) else " class=prose" if len(cell) > 60 else ""


def _picture(picture: Picture) -> str:
    encoded = base64.b64encode(picture.data).decode()
    caption = html.escape(picture.caption)
    return (f'<figure><img alt="{caption}" src="data:image/{picture.kind};base64,{encoded}">'
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip
