"""Words and numbers that a hostile user brings: in titles, settings, parameters, histories and on the command line."""

import json
import os
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from nbformat import v4
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowerlib.lab import explore, report, runs
from flowerlib.lab.settings import PROFILES

HARD = bool(os.environ.get("FLOWERLIB_HARD"))
MARKUP = [
    "x<b>y", "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[x](javascript:alert(1))",
    "![x](javascript:alert(1))", "<javascript:alert(1)>", "https://example.org", "javascript://x/%0aalert(1)",
    '" onmouseover="alert(1)', "' onfocus='alert(1)", "`</code><b>x</b>", "a `b` c", "*a* **b** _c_ __d__ ~~e~~",
    "a | b | c", "$x$ and $$y$$", "$\\href{javascript:alert(1)}{x}$", "\\(x\\) \\\\[y\\\\] \\begin{a}b\\end{a}",
    "&lt;b&gt; &amp;", "&#60;b&#62;", "[a]: javascript:alert(1)", "[x][y] [^1]", "--><b>", "]]><b>", "</td></table><b>",
    "</figcaption><b>", "\\<b\\>x", "a\\", "{{ 7 * 7 }}{% raw %}", "\u202e<b>", "＜b＞", "<b", "$", "$5 and $6",
]
LINES = ["a\n\n<b>c</b>", "a\n\n[x](javascript:alert(1))", "a\n# b", "a\n- b\n- c", "a\n\n    b", "a\r\rb [x](y)", "a\n===\n"]

TOGETHER = [*MARKUP[:4], MARKUP[-1], " ".join(MARKUP), "".join(reversed(MARKUP))]  # the quick part


class Elements(HTMLParser):
    """Every element with the names of its attributes, every address, and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.addresses, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag != "span" or [name for name, _ in attributes] != ["class"]:  # colours of code
            self.elements.append((tag, *sorted(name for name, _ in attributes)))
        self.addresses += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, text):
        self.words.append(text)


def run_that_says(folder, text, lines):
    """A run made by hand with `text` in every place that the report prints, and `lines` where there may be several."""
    names = [f.name for f in fields(PROFILES["smoke"]) if type(f.default) is str]
    settings = asdict(PROFILES["smoke"]) | dict.fromkeys(names, text) | {"prompt": lines}
    source = {"settings": settings, "commit": text, "device": lines, "versions": {"torch": text}, "seconds": 1.0}
    lists = {"method": text, "decoding": text, "seen": text, "seed": 0, "n_users": 3, "h_bits": 1.0, "distinct": 2}
    for name in ("ndcg@10", "hr@10", "dgu"):
        lists |= dict.fromkeys((name, f"{name}_lo", f"{name}_hi"), 0.5)
    fit = {"n_titles": 3, "target": text, "method": "sft", "paths": "reward", "budget": 1, "kl_target_model": 0.5,
           "kl_model_target": 0.5, "js": 0.5, "catalogue_mass": 0.5, "forward_tokens": 1, "seconds": 1.0}
    rows = {"04_bias_and_diversity": lists, "05_fit_a_known_distribution": fit, "07_which_title_next": lists}
    for name, row in rows.items():
        for place in ("results", "figures", "notebooks"):
            (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / "results" / f"{name}.json").write_text(json.dumps({"provenance": source, "rows": [row]}))
        title = PngInfo()
        title.add_itxt("Title", lines)
        Image.new("1", (1, 1)).save(folder / "figures" / f"{name[:2]}_a.png", pnginfo=title)
        shown = nbformat.v4.output_from_msg({"header": {"msg_type": "display_data"}, "content": {
            "data": {"image/png": "aGk=", "text/plain": text}, "metadata": {}}})
        table = pd.DataFrame({text: [lines]}, index=pd.Index([text], name=text))
        told = [shown, v4.new_output("stream", text=lines), v4.new_output("error", ename=text, evalue=text, traceback=[lines]),
                v4.new_output("execute_result", {"text/html": table.to_html(), "text/plain": str(table)})]
        code = v4.new_code_cell(f'runs.save_figure(figure, out / "figures" / "{name[:2]}_a.png")', outputs=told)
        given = v4.new_code_cell(f"dataset = {text!r}")
        cells = [v4.new_markdown_cell(f"# {name}\n\n**Do.** Read."), given, code]
        nbformat.write(v4.new_notebook(cells=cells), folder / "notebooks" / f"{name}.ipynb")
    return folder


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    return Elements(report.report(run_that_says(tmp_path_factory.mktemp("a"), "harmless", "harmless")).read_text())


@pytest.mark.parametrize("text", MARKUP + [a + b for a in MARKUP for b in MARKUP[:4]] if HARD else TOGETHER)
def test_words_in_a_report_are_words(tmp_path, harmless, text):
    folder = run_that_says(tmp_path / text.replace("/", "∕").replace("\0", "")[:40].rstrip(), text, text)
    page = Elements(report.report(folder).read_text(encoding="utf-8"))
    assert page.elements == harmless.elements
    assert not [address for address in page.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert "".join(page.words).count(text) >= 20  # it is shown, letter by letter


@pytest.mark.parametrize("lines", LINES if HARD else ["\n".join(LINES), "\n\n".join(LINES)])
def test_lines_in_a_report_are_words(tmp_path, harmless, lines):
    page = Elements(report.report(run_that_says(tmp_path, "harmless", lines)).read_text(encoding="utf-8"))
    assert page.elements == harmless.elements
    assert not [address for address in page.addresses if "javascript" in address]
