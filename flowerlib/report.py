"""A run as one page that needs no network: `python -m flowerlib.report --out runs/laptop`.

What was found comes first (tables, figures and what they say), then the executed notebooks, then settings and
provenance.
"""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from . import runs, tables

TABLES = {"05_fit_a_known_distribution": tables.fit_table, "07_which_title_next": tables.next_table}
FIGURE = re.compile(r'"figures" / "(\w+\.png)"')
FORMULA = re.compile(r"(?P<code>```.+?```|`[^`\n]+`)|\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$]+?)(?<![\s\\])\$(?![\w$])", re.DOTALL)
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_css %}<style>
main { max-width: 72rem; margin: auto; }
.jp-RenderedHTMLCommon img { max-width: 100%; }
.jp-RenderedHTMLCommon figure img { max-width: 46rem; }
@media print { h1 { break-before: page; } img, table, figure { break-inside: avoid; } .jp-InputArea-editor { display: none; } }
</style>{% endblock %}
"""


def report(folder: Path) -> Path:
    """Writes every executed notebook of a run, and before them what was found, into `folder`/report.html.

    Raises:
        FileNotFoundError: no notebook was executed there. ValueError: a results file is damaged.
    """
    from nbconvert import HTMLExporter

    names = sorted(path.name for path in (folder / "notebooks").glob("*.ipynb"))
    if not names:
        raise FileNotFoundError(f"{folder} holds no executed notebook: run `make reproduce` first")
    notebooks = {name: nbformat.read(folder / "notebooks" / name, as_version=4) for name in names}
    first = next(iter(notebooks.values()))
    joint = nbformat.v4.new_notebook(metadata={"kernelspec": first.metadata.get("kernelspec", {})})
    joint.cells.append(nbformat.v4.new_markdown_cell(_found(folder, notebooks)))
    for notebook in notebooks.values():
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if not is_noise(output)]
                _describe(cell, folder)
            joint.cells.append(cell)
    joint.cells.append(nbformat.v4.new_markdown_cell(_provenance(folder)))
    for n, cell in enumerate(joint.cells, 1):
        cell["id"] = str(n)
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(_mathml, cell.source)
    with runs.atomic(folder / "report.html") as new:
        resources = {"metadata": {"name": f"Flower, {folder.name}"}}
        new.write_text(HTMLExporter(raw_template=PAGE).from_notebook_node(joint, resources)[0], encoding="utf-8")
    return folder / "report.html"


def is_noise(output: Mapping[str, Any]) -> bool:
    """Whether a cell's output is a progress bar, a widget or a warning."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def comparison(folder: Path) -> pd.DataFrame:
    """SFT against Flower, from the results file of notebook 04."""
    rows = pd.DataFrame(runs.read_results(folder / "results" / "04_bias_and_diversity.json"))
    k = max(int(name.split("@")[1]) for name in rows if name.startswith("ndcg@") and name.split("@")[1].isdigit())
    figures = [f"ndcg@{k}", f"hr@{k}", "dgu", "mgu", "h_bits", "ttr", "distinct", "gini"]
    return rows.set_index(["seen", "decoding", "method"]).sort_index(ascending=False)[figures].round(3)


def headline(folder: Path) -> str:
    """What run this is, in one line."""
    found = runs.read_document(folder / "results" / "04_bias_and_diversity.json")
    chosen, n_users = found["provenance"]["settings"], found["rows"][0]["n_users"]
    line = f"Profile {chosen['profile']}: {chosen['dataset']}, model {chosen['model']}, {n_users:,} test rows, one seed."
    if chosen["model"] == "tiny":
        line += " A tiny random model: it shows that everything runs, not which method is better."
    return line


def _found(folder: Path, notebooks: Mapping[str, Any]) -> str:
    """The story: headline and table if notebook 04 was run, then every notebook's task, table, figures and what they say."""
    parts = ["# Flower: what was found"]
    results = folder / "results" / "04_bias_and_diversity.json"
    if results.exists():
        parts += [headline(folder), tables.comparison_table(results)]
    for name, notebook in notebooks.items():
        # papermill puts a cell of its own before the first one of a notebook that stopped with an error
        texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        heading, _, task = next((text for text in texts if text.startswith("# ")), f"# {name}").partition("\n\n")
        heading = heading.removeprefix("# ").strip()
        parts += [f"## [{heading}](#{heading.replace(' ', '-')})", task.split("\n\n")[0].removeprefix("**Do.** ")]
        if any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", [])):
            parts.append("**This notebook stopped with an error**: see there.")
        results = folder / "results" / f"{Path(name).stem}.json"
        if results.stem in TABLES and results.exists():
            parts.append(TABLES[results.stem](results))
        for path in sorted((folder / "figures").glob(f"{name[:2]}_*.png")):
            said = escape(_message(path))
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<figure><img alt="{said}" src="data:image/png;base64,{data}"><figcaption>{said}</figcaption></figure>')
    return "\n\n".join(parts)


def _message(figure: Path) -> str:
    """The titles that a figure was saved with."""
    from PIL import Image

    with Image.open(figure) as image:
        return image.text.get("Title") or figure.stem


def _describe(cell: Any, folder: Path) -> None:
    """Gives a cell's pictures the titles of the figure that it saves as alternative text."""
    named = FIGURE.search(cell.source)
    path = folder / "figures" / named[1] if named else None
    said = _message(path) if path and path.exists() else "figure: " + cell.source.split("\n")[0]
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            output.metadata["image/png"] = output.metadata.get("image/png", {}) | {"alt": said}


def _provenance(folder: Path) -> str:
    """Settings, versions, commit and times of every results file."""
    columns = {}
    for path in sorted((folder / "results").glob("*.json")):
        source = runs.read_document(path)["provenance"]
        keys = ("commit", "device", "threads", "bfloat16", "seconds", "matmul_1024_seconds")
        flat = {key: source[key] for key in keys if key in source}
        columns[path.stem] = flat | source.get("versions", {}) | source.get("settings", {})
    table = pd.DataFrame(columns).astype(object).fillna("").to_html(border=0)
    return f"# Settings and provenance\n\nOne column a results file of `{folder.name}/results`.\n\n{table}"


def _mathml(found: re.Match[str]) -> str:
    """A formula as MathML; code, and a formula that the converter does not know, as they were."""
    from latex2mathml.converter import convert

    if found["code"]:
        return found[0]
    try:
        return convert(found[2] or found[3], display="block" if found[2] else "inline").replace("\n", "")
    except Exception:  # the converter has no error class of its own
        return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/laptop", help="folder of the run, from the project's root")
    try:
        print(f"report: {report(runs.ROOT / parser.parse_args().out)}")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
