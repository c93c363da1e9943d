"""A run as one page that needs no network: `python -m flowerlib.lab.report --out runs/laptop`."""

import argparse
import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from PIL import Image

from . import runs, store

HEADS = {  # entry of a row → head of its column, where they differ
    "seen": "seen titles", "mgu": "MGU", "top_vs_history": "top group − history", "top_vs_next": "top group − next",
    "mgu_next": "MGU − next", "h_bits": "H (bits)", "ttr": "TTR", "distinct": "distinct titles", "dgu": "DGU",
    "gini": "Gini", "n_titles": "titles", "kl_target_model": "KL(target‖model), nats", "js": "JS", "ndcg@10": "NDCG@10",
    "kl_model_target": "KL(model‖target)", "catalogue_mass": "mass on the catalogue", "name": "ours / the other way",
    "peak_mb_so_far": "peak memory so far, MB", "matmul_1024_seconds": "1024 × 1024 matrix product then, seconds"}
SETTINGS = {"reward": "reward {}", "alpha": "α = {:g}", "theta": "θ = {:g}", "decoding_alpha": "α = {:g}",
            "guide": "weight {:g}", "temperature": "{:g}"}
CLAIMS = (  # the paper's beside the fit; -1: less is claimed, 1: more, 0: no less; without a metric there is no run
    ("dgu", -1, "Flower is fairer than SFT (DGU)", "0.198 → 0.052"),
    ("h_bits", 1, "… more diverse (H, bits)", "7.828 → 8.428"),
    ("ndcg", 0, "… as accurate (NDCG)", "comparable"),
    ("", 0, "… the better reference of S-DPO, DMPO, RosePO and PPO", "better in all"),
    ("", 0, "The reward div is best; a token is the best step", "ablations"))
FORMULA = re.compile(r"(```.+?```|`[^`\n]+`)|\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$]+?)(?<![\s\\])\$(?![\w$])", re.S)
SPECIAL = re.compile(r"[][<>&\"`$|\\*~#\n\r]|(?<![^\W_])_|_(?![^\W_])|:(?=/)")  # to HTML, Markdown or MathML
IMAGE = '<img alt="{}" src="data:image/png;base64,{}">'
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}{% block html_head_css %}<style>
main { max-width: 72rem; margin: auto; } .jp-RenderedHTMLCommon figure img { max-width: 46rem; }
@media print { h1 { break-before: page; } img, table, figure { break-inside: avoid; } }
@media print { .jp-InputArea-editor { display: none; } }
</style>{% endblock %}
"""


def markdown(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A Markdown table of these entries of rows, numbers to three digits, columns aligned for a terminal."""
    columns = [[HEADS.get(n.lower(), n.replace("_", " ")), "---", *(_text(row.get(n)) for row in rows)] for n in names]
    aligned = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*aligned))


def _text(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    whole = abs(value) >= 99.95 or value == int(value)
    return format(value, ",.0f" if whole else ".3f" if 0.01 <= abs(value) < 1 else "#.3g")


def plain(text: str) -> str:
    """Text of data and settings as Markdown that shows it letter by letter: no element, link or formula."""
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};", text)


def lists_table(rows: Sequence[Mapping[str, Any]], *without: str) -> str:
    """Lists of all test users as Markdown, with 95% intervals, most accurate first; without: entries to leave out."""
    table = [dict(row) for row in rows if row.get("part", "test") == "test"]
    k = max(int(match[1]) for name in table[0] if (match := re.fullmatch(r"ndcg@(\d+)", name)))
    table.sort(key=lambda row: (row["seen"] == "allowed", "normalised" in row["decoding"], -row.get(f"ndcg@{k}", 2)))
    for row in table:
        settings = [text.format(row[key]) for key, text in SETTINGS.items() if key in row]
        row["method"] += f" ({', '.join(settings)})" if settings else ""
        row["decoding"] = row["decoding"].replace("_", ", length-")
        row |= {name: plain(row[name]) for name in ("method", "decoding", "seen")}
        for name in (f"ndcg@{k}", f"hr@{k}", "dgu", "top_vs_next", "mgu_next"):
            if f"{name}_lo" in row:
                row[name.upper()] = "{} [{}, {}]".format(*(_text(row[name + end]) for end in ("", "_lo", "_hi")))
    names = f"method decoding seen trainings NDCG@{k} HR@{k} DGU top_vs_history TOP_VS_NEXT MGU_NEXT mgu h_bits ttr"
    held = {name for row in table for name in row} - {*without}
    return markdown(table, [name for name in [*names.split(), "distinct", "gini"] if name in held])


def verdict_table(fit: Sequence[Mapping[str, Any]], studies: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The paper's claims, its figures, ours (SFT → Flower), and what ours, of several trainings, say of them. A
    difference counts if p, adjusted by Holm, is < 0.05; accuracy is comparable if all of its 95% interval is > −10%.
    fit: rows of notebook 05 (medians over seeds). studies: data → rows of notebook 07."""
    words = {True: "borne out", False: "contradicted", None: "undecided"}
    ours, found, of = [], {}, pd.DataFrame(row for row in fit if (row["target"], row["paths"]) == ("counts", "reward"))
    small = of[(of.n_titles == of.n_titles.min()) & (of.budget == of.budget.min())] if len(of) else of
    if len(of) and {"sft", "subtb"} <= {*small.method}:
        median = small.groupby("method")[["kl_target_model", "catalogue_mass"]].median()
        kl, mass = (median.loc[["sft", "subtb"], name].tolist() for name in median)
        ours = ["{} → {} on the tree; mass on the titles {} → {}".format(*map(_text, kl + mass))]
        found[""] = words[kl[1] < kl[0]] if (kl[1] < kl[0]) == (mass[1] >= mass[0]) else "in part"
    table = [("Flower fits known counts better than SFT (KL, nats)", "2.193 → 0.246", ours, found)]
    for metric, sign, claim, paper in CLAIMS:
        ours, found = [], {}
        for data, rows in studies.items():
            beams = {row["method"]: row for row in rows if (row["decoding"], row["seen"]) == ("beam", "excluded")}
            row = beams.get("Flower", {})
            for key in [key for key in row if re.fullmatch(rf"{metric}(@\d+)?_minus_sft", key)]:
                pair = [beams[name][key.removesuffix("_minus_sft")] for name in ("SFT", "Flower")]
                change, lo, hi, p = (row[f"{key}{end}"] for end in ("", "_lo", "_hi", "_p"))
                least = -0.1 * pair[0]  # for "no less"
                gain = sign * change > 0 if sign else lo > least
                sure = row["trainings"] > 1 and (p < 0.05 if sign else not lo <= least <= hi)
                text = "{}: {} → {}, difference {} [{}, {}]".format(plain(data), *map(_text, (*pair, change, lo, hi)))
                ours.append(text + ", one training" * (row["trainings"] == 1))
                found[plain(data)] = words[gain if sure else None]
        table.append((claim, paper, ours, found))
    said = ["; ".join({*found.values()} if len({*found.values()}) < 2 else map(": ".join, found.items()))
            or "not tested" for *_, found in table]
    return markdown([{"claim": claim, "paper": paper, "ours": "; ".join(ours) or "not run", "verdict": word}
                     for (claim, paper, ours, _), word in zip(table, said)], ["claim", "paper", "ours", "verdict"])


def fit_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Fits of a known distribution as Markdown: medians over seeds, and the range of KL(target‖model)."""
    groups = pd.DataFrame(rows).groupby(["n_titles", "target", "method", "paths", "budget"])
    spread = groups.kl_target_model.agg(seeds="size", least="min", most="max")
    table = groups.median(numeric_only=True).join(spread).reset_index()
    drawn = table.paths.isin(["policy", "schedule"]) & (table.method != "rloo")
    table["method"] = table.method.map(runs.METHOD_NAMES) + (", paths " + table.paths).where(drawn, "")
    rows = table.sort_values(["n_titles", "target", "kl_target_model"]).to_dict("records")
    names = "n_titles target method kl_target_model seeds least most kl_model_target js catalogue_mass forward_tokens"
    return markdown(rows, [*names.split(), "seconds"])


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `make bench` measured, as Markdown: ratios of times, taken in turns in one process."""
    words = {None: "tried", True: "yes", False: "**no**"}
    table = [{**row, "within_bound": words[row["bound"] and row["ratio"] <= row["bound"]]} for row in rows]
    return markdown(table, "name predicted ratio least most bound within_bound".split())


def timing_table(timings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Times and memory of these notebooks as Markdown, from a run's timings.json."""
    table = [timings[name] | {"notebook": Path(name).stem} for name in names]
    table.append({"notebook": "**together**", "seconds": sum(row["seconds"] for row in table)})
    return markdown(table, "notebook seconds peak_mb_so_far matmul_1024_seconds".split())


def report(folder: Path) -> Path:
    """Writes `folder`/report.html: results (tables, figures, what they say), the executed notebooks, then provenance.
    Raises FileNotFoundError if no notebook was executed there, ValueError if a file is damaged."""
    notebooks = {}
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        with store.reading(path):
            notebooks[path.stem] = nbformat.read(path, 4)
    if not notebooks or folder.samefile(store.ROOT):
        raise FileNotFoundError(f"{folder} holds no executed notebook: run `make reproduce` first")
    first, last = map(nbformat.v4.new_markdown_cell, (_results(folder, notebooks), _provenance(folder / "results")))
    cells = [first, *(cell for book in notebooks.values() for cell in book.cells if cell.cell_type != "raw"), last]
    for n, cell in enumerate(cells, 1):
        cell["id"] = str(n)
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(_mathml, cell.source)
        elif cell.cell_type == "code":
            _clean(cell, folder / "figures")
    joint = nbformat.v4.new_notebook(cells=cells, metadata={"title": f"Flower, {folder.name}"})
    with store.atomic(folder / "report.html") as new:
        exporter = HTMLExporter(raw_template=PAGE, filters={"clean_html": lambda code: code})  # highlighting escapes
        new.write_text(exporter.from_notebook_node(joint)[0], encoding="utf-8")
    return folder / "report.html"


def is_noise(output: Mapping[str, Any]) -> bool:
    """Whether a cell's output is a progress bar, a widget or a warning."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def headline(folder: Path) -> str:
    """What run this is, in one line."""
    with store.reading(path := folder / "results" / "04_bias_and_diversity.json"):
        document = runs.read_document(path)
        used = document["rows"][0] | document["provenance"]["settings"]
        line = "Profile {profile}: {dataset}, model {model}, {n_users:,} test rows, one seed.".format_map(used)
    tiny = " A tiny random model: it shows that everything runs, not which method is better."
    return line + (tiny if used["model"] == "tiny" else "") + choice(folder)


def choice(folder: Path) -> str:
    """What notebook 04 chose for the run's data on validation users, and what is more accurate; "" without its file."""
    if not (path := folder / "results" / "04_choice.json").exists():
        return ""
    with store.reading(path):
        rows = runs.read_results(path)
        row = next(row for row in rows if row["chosen"])
        better = [f"{one['method']} ({one['difference']:+.3f} NDCG)" for one in rows if one.get("lo", 0) > 0]
        how = f", α = {row['decoding_alpha']:g} while decoding" if row["decoding_alpha"] else ", as it is"
        line = f" Chosen for these data, on {row['n_users']:,} validation users: {row['method']}{how}."
    line += " More accurate without a language model: " + " and ".join(better) + "." if better else ""
    return line + (" No other setting is to be preferred to SFT." if row is rows[0] else "")


def _results(folder: Path, notebooks: Mapping[str, Any]) -> str:
    """Notebook 04's headline and table if it ran; then each notebook's task, table, figures and what these say."""
    results, parts = folder / "results", ["# Flower: results"]
    if (path := results / "04_bias_and_diversity.json").exists():
        with store.reading(path):
            parts += [plain(headline(folder)), lists_table(runs.read_results(path))]
    for name, notebook in notebooks.items():
        # papermill puts a cell of its own before the first one of a notebook that stopped with an error
        texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        heading, _, task = next((text[2:] for text in texts if text.startswith("# ")), plain(name)).partition("\n\n")
        parts += [f"## [{heading}](#{heading.replace(' ', '-')})", task.split("\n\n")[0].removeprefix("**Do.** ")]
        if any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", [])):
            parts.append("**This notebook stopped with an error**: see there.")
        table, path = {"05": fit_table, "07": lists_table}.get(name[:2]), results / f"{name}.json"
        if table and path.exists():
            with store.reading(path):
                parts.append(table(runs.read_results(path)))
                if table is lists_table:
                    fit = results / "05_fit_a_known_distribution.json"
                    known = runs.read_results(fit) if fit.exists() else []
                    parts += ["The paper's claims here:", verdict_table(known, {folder.name: runs.read_results(path)})]
        for path in sorted((folder / "figures").glob(f"{name[:2]}_*.png")):
            text, data = plain(_titles(path)), base64.b64encode(path.read_bytes()).decode()
            parts.append(f"<figure>{IMAGE.format(text, data)}<figcaption>{text}</figcaption></figure>")
    return "\n\n".join(parts)


def _titles(figure: Path) -> str:
    """The titles that a figure was saved with."""
    with store.reading(figure), Image.open(figure) as image:
        return image.text.get("Title") or figure.stem


def _clean(cell: Any, figures: Path) -> None:
    """Takes noise out of a cell, and gives its pictures the titles of the figure that it saves as alternative text."""
    named = re.search(r'"figures" / "(\w+\.png)"', cell.source)
    saved = figures / named[1] if named else figures
    text = _titles(saved) if saved.is_file() else "figure: " + cell.source.split("\n")[0]
    cell.outputs = [output for output in cell.get("outputs", []) if not is_noise(output)]
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            output.data = {"text/html": IMAGE.format(plain(text), output.data["image/png"])}


def _provenance(results: Path) -> str:
    """Settings, versions, commit and times of every results file; several values of one entry side by side."""
    columns = {}
    for path in sorted(results.glob("*.json")):
        source = runs.read_document(path)["provenance"]
        versions = pd.json_normalize(source.get("versions", {})).to_dict("list")
        columns[path.stem] = pd.json_normalize(source | {"versions": versions}, sep=" ").iloc[0].to_dict()
    text = pd.DataFrame(columns).map(lambda x: ", ".join(dict.fromkeys(map(str, x))) if isinstance(x, list) else x)
    with pd.option_context("display.max_colwidth", None):
        lines = text.fillna("").to_html(border=0).replace("$", "&#36;").splitlines()
    table = "\n".join(filter(str.strip, lines))  # a blank line would end it
    return f"# Settings and provenance\n\nOne column a results file of {plain(results.parent.name)}.\n\n{table}"


def _mathml(match: re.Match[str]) -> str:
    """A formula as MathML; code, and a formula that the converter does not know, as they were."""
    try:
        return match[1] or convert(match[2] or match[3], display="block" if match[2] else "inline").replace("\n", "")
    except Exception:  # the converter has no error class of its own
        return match[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/laptop", help="folder of the run, from the project's root")
    try:
        print(f"report: {report(store.ROOT / parser.parse_args().out)}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
