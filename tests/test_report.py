"""Tables by hand; a run as one page: what it says, that it needs no network, what it does with a damaged run."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest

from flowerlib.lab import report, reproduce, runs, store

FIT = {"target": "counts", "n_titles": 100, "budget": 9, "seed": 0}
METRICS = {"mgu": 0.05, "h_bits": 7.123, "ttr": 0.1, "distinct": 20.0, "gini": 0.9, "ndcg@1": 0.1}
LISTS = {"method": "SFT", "decoding": "beam_normalised", "seen": "excluded", "trainings": 2} | METRICS
for name in ("hr@10", "ndcg@10", "dgu"):
    LISTS |= {name: 0.2, f"{name}_lo": 0.1, f"{name}_hi": 0.3}


def cells(table):
    """Lines of a Markdown table as lists of cells, the rule under the head left out."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == len({len(line) for line in table.splitlines()}) == 1
    assert set(lines[1]) == {"---"}
    return lines[:1] + lines[2:]


def test_the_verdict_by_hand():
    known = FIT | {"paths": "reward"}
    fit = [known | {"method": "sft", "kl_target_model": kl, "catalogue_mass": 0.9} for kl in (0.3, 0.2, 0.1)]
    fit += [known | {"method": "subtb", "kl_target_model": 0.05, "catalogue_mass": 0.8},
            known | {"method": "subtb", "budget": 99, "kl_target_model": 0.9, "catalogue_mass": 0.9},
            known | {"method": "subtb", "paths": "policy", "kl_target_model": 9.0, "catalogue_mass": 0.9}]

    def flower(**differences):
        ends = [("", 0), ("_lo", -0.05), ("_hi", 0.05)]
        own = {f"{name}_minus_sft{end}": d + e for name, (d, _) in differences.items() for end, e in ends}
        return LISTS | {"decoding": "beam", "method": "Flower", "dgu": 0.1, "trainings": 3} | own | {
            f"{name}_minus_sft_p": p for name, (_, p) in differences.items()}

    sft, other = LISTS | {"decoding": "beam"}, {"seen": "allowed", "decoding": "beam", "method": "Flower", "dgu": 0.9}
    names = {"ndcg@10": (-0.01, 1.0), "h_bits": (0.1, 0.06)}
    good, bad = flower(dgu=(-0.1, 0.01), **names), flower(dgu=(0.1, 0.01), **names)
    head, *lines = cells(report.verdict_table(fit, {"a": [sft, good, other], "b": [sft, bad]}))
    assert head == ["claim", "paper", "ours", "verdict"]
    assert lines[0][1:] == ["2.193 → 0.246", "0.200 → 0.050 on the tree; mass on the titles 0.900 → 0.800", "in part"]
    assert lines[1][2:] == ["a: 0.200 → 0.100, difference -0.100 [-0.150, -0.050]; "
                            "b: 0.200 → 0.100, difference 0.100 [0.050, 0.150]", "a: borne out; b: contradicted"]
    assert [line[-1] for line in lines[2:]] == ["undecided", "undecided", "not tested", "not tested"]
    assert cells(report.verdict_table([fit[3], fit[0] | {"n_titles": 10**6}], {}))[1][-1] == "not tested"
    alone = [line[-1] for line in cells(report.verdict_table([], {"b": [sft, bad]}))[1:]]
    assert alone == ["not tested", "contradicted", "undecided", "undecided", "not tested", "not tested"]
    once = cells(report.verdict_table([], {"b": [sft, bad | {"trainings": 1}]}))[2]
    assert once[2:] == ["b: 0.200 → 0.100, difference 0.100 [0.050, 0.150], one training", "undecided"]
    level = [sft, flower(**{"ndcg@5": (0.04, 1.0), "h_bits": (0.1, 0.04)}) | {"ndcg@5": 0.3}]
    level[0]["ndcg@5"] = 0.3
    assert [line[-1] for line in cells(report.verdict_table([], {"c": level}))[2:5]] == [
        "not tested", "borne out", "borne out"]


def test_what_a_run_chose_stands_in_its_headline(tmp_path):
    assert report.choice(tmp_path) == ""
    sft = {"method": "SFT", "decoding_alpha": 0.0, "n_users": 400, "chosen": True}
    other = sft | {"decoding_alpha": -0.25, "chosen": False}
    plain = [{"method": name, "chosen": False, "difference": 0.02, "lo": lo} for name, lo in (("EASE", 0.01), ("p", -1))]
    path = tmp_path / "results" / "04_choice.json"
    for rows, said in (([sft, other], "SFT, as it is. No other setting is to be preferred to SFT."),
                       ([sft | {"chosen": False}, other | {"chosen": True}, *plain],
                        "SFT, α = -0.25 while decoding. More accurate without a language model: EASE (+0.020 NDCG).")):
        store.write_json(path, {"rows": rows, "provenance": {}})
        assert report.choice(tmp_path) == f" Chosen for these data, on 400 validation users: {said}"


def test_numbers_in_tables():
    texts = {None: "", "x": "x", 0: "0", 3: "3", 20.0: "20", 24010: "24,010", 0.2: "0.200", 0.0813: "0.081",
             0.00157: "0.00157", 9e-5: "9.00e-05", 1.025: "1.02", 61.71: "61.7", 123.4: "123", 99.97: "100"}
    rows = [{"a": value} for value in texts]
    assert cells(report.markdown(rows, ["a", "h_bits", "forward_tokens"])) == [
        ["a", "H (bits)", "forward tokens"], *([text, "", ""] for text in texts.values())]


def test_a_table_of_lists_by_hand():
    better = {"ndcg@10": 0.25, "method": "Flower-KL", "alpha": -0.5, "theta": 0.1}
    rows = [LISTS | {"seen": "allowed", "decoding": "top"}, LISTS, LISTS | better,
            LISTS | {"decoding": "beam", "part": "test"}, LISTS | {"part": "test, some users"}]
    oracle = {key: value for key, value in LISTS.items() if "@10" not in key} | {"method": "Next choices"}
    head, *lines = cells(report.lists_table(rows, "ttr"))
    assert head == ["method", "decoding", "seen titles", "trainings", "NDCG@10", "HR@10", "DGU", "MGU", "H (bits)",
                    "distinct titles", "Gini"]
    text = "0.200 [0.100, 0.300]"
    assert lines[0] == ["SFT", "beam", "excluded", "2", text, text, text, "0.050", "7.12", "20", "0.900"]
    assert [line[:4] for line in lines[1:]] == [
        ["Flower-KL (α = -0.5, θ = 0.1)", "beam, length-normalised", "excluded", "2"],
        ["SFT", "beam, length-normalised", "excluded", "2"], ["SFT", "top", "allowed", "2"]]
    oracle |= {"top_vs_next": 0.0, "top_vs_next_lo": -0.1, "top_vs_next_hi": 0.1}
    head, first, _ = cells(report.lists_table([LISTS, oracle]))
    assert first[:5] == ["Next choices", "beam, length-normalised", "excluded", "2", ""]
    assert first[head.index("top group − next")] == "0 [-0.100, 0.100]"
    assert rows[0]["decoding"] == "top" and rows[2]["method"] == "Flower-KL"  # the rows are as they were


def test_the_other_tables_by_hand():
    fit = {"n_titles": 1100, "target": "counts", "method": "sft", "paths": "reward", "budget": 9,
           "kl_model_target": 0.1, "js": 0.01, "catalogue_mass": 0.98765, "forward_tokens": 24010, "seconds": 61.7,
           "curve": {"step": [0]}}
    rows = [fit | {"kl_target_model": kl} for kl in (0.3, 0.1, 0.2)]
    rows += [fit | {"method": "subtb", "kl_target_model": 0.05, "paths": "policy"},
             fit | {"method": "rloo", "kl_target_model": 0.4, "paths": "policy"}]
    head, *lines = cells(report.fit_table(rows))
    assert head[3:7] == ["KL(target‖model), nats", "seeds", "least", "most"]
    same = ["0.100", "0.010", "0.988", "24,010", "61.7"]
    subtb = f"{runs.METHOD_NAMES['subtb']}, paths policy"
    assert lines == [["1,100", "counts", subtb, "0.050", "1", "0.050", "0.050", *same],
                     ["1,100", "counts", "SFT", "0.200", "3", "0.100", "0.300", *same],
                     ["1,100", "counts", "RLOO", "0.400", "1", "0.400", "0.400", *same]]
    speed = [{"name": "a / b", "ratio": 0.5, "bound": 1.0, "predicted": None, "least": 0.4, "most": 0.6},
             {"name": "c / d", "ratio": 1.5, "bound": 1.0, "predicted": 1.4},
             {"name": "e / f", "ratio": 2.0, "bound": None}]
    assert cells(report.speed_table(speed))[1:] == [["a / b", "", "0.500", "0.400", "0.600", "1", "yes"],
                                                    ["c / d", "1.40", "1.50", "", "", "1", "**no**"],
                                                    ["e / f", "", "2", "", "", "", "tried"]]
    entry = {"seconds": 10.4, "peak_mb_so_far": 1500, "matmul_1024_seconds": 0.01}
    lines = cells(report.timing_table(dict.fromkeys(reproduce.NOTEBOOKS, entry), reproduce.NOTEBOOKS))
    assert lines[1] == ["01_prepare_the_data", "10.4", "1,500", "0.010"]
    assert lines[-1] == ["**together**", "41.6", "", ""]


def test_formulas_and_prices():
    text = report.FORMULA.sub(report._mathml, "for $5 or $6, and $x^2$ of\n$$F(s) = \\sum_i R(i)$$")
    assert text.startswith("for $5 or $6, and <math") and text.count("<math") == 2 and 'display="block"' in text
    for same in ("`PRICE=$x$`", "```\necho $HOME$\n```", "$\\left($"):
        assert report.FORMULA.sub(report._mathml, same) == same


def test_provenance_of_work_that_several_commits_made(tmp_path):
    settings = {"profile": "smoke", "bfloat16": True, "sweep": [[0, 0.5], [-0.5, 0.1]]}
    one = store.provenance(settings, 2.0) | {"commit": "aaa"}
    two = one | {"commit": "bbb", "versions": one["versions"] | {"torch": "9.9"}, "device": "another", "seconds": 3.0}
    runs.write_results(tmp_path / "results" / "a.json", [{"x": 1}], [one, two])
    runs.write_results(tmp_path / "results" / "b.json", [{"x": 1}], one | {"settings": {"prompt": "y" * 99}})
    text = report._provenance(tmp_path / "results")
    rows = dict(re.findall(r"<th>([^<]*)</th>\s*((?:<td>[^<]*</td>\s*)+)", text))
    rows = {entry: re.findall("<td>(.*?)</td>", values) for entry, values in rows.items()}
    assert rows["commit"] == ["aaa, bbb", "aaa"] and rows["seconds"] == ["5.0", "2.0"]
    assert rows["versions torch"] == [f"{one['versions']['torch']}, 9.9", one["versions"]["torch"]]
    assert rows["versions numpy"] == [one["versions"]["numpy"]] * 2
    assert rows["bfloat16"] == ["False", "False"] and rows["settings bfloat16"] == ["True", ""]
    assert rows["settings sweep"] == ["[0, 0.5], [-0.5, 0.1]", ""] and rows["settings prompt"] == ["", "y" * 99]


def test_the_report_imports_no_plots():
    source = Path(report.__file__).read_text(encoding="utf-8")
    assert not re.search(r"import .*(plots|seaborn)|from .*(plots|seaborn)", source)


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `make reproduce` first"):
        report.report(tmp_path)


def test_no_text_of_a_cell_becomes_an_element_of_the_page(tmp_path):
    script = "<script>alert(1)</script>"
    cells = [nbformat.v4.new_code_cell(f"x = '{script}'  # {script}"), nbformat.v4.new_raw_cell(script)]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_a.ipynb")
    page = report.report(tmp_path).read_text(encoding="utf-8")
    assert script not in page and page.count("&lt;script&gt;alert") == 2


@pytest.fixture
def page(smoke, once):
    """The report of the whole run."""

    def make(folder):
        folder.mkdir()
        shutil.copy(report.report(smoke), folder)

    return (once("page", make) / "report.html").read_text(encoding="utf-8")


def test_a_page_holds_all_notebooks_and_all_methods(smoke, page):
    assert all(f'<h1 id="{n}-' in page for n in ("01", "02", "03", "04"))
    assert "step/s" not in page
    assert report.headline(smoke) in page and "one seed. A tiny random model" in page
    results = page.split("01 · ")[0]
    table = cells(report.lists_table(runs.read_results(smoke / "results" / "04_bias_and_diversity.json")))
    assert {"Next choices", "Popularity", "SFT", "Flower-KL"} == {line[0] for line in table[1:]}
    assert all(f"<td>{cell}</td>" in results for line in table[1:] for cell in line)


def test_the_report_needs_no_network_and_says_what_its_pictures_show(smoke, page):
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", page) and "import(" not in page
    alts = re.findall(r"<img[^>]*?alt=\"(.*?)\"", page, re.DOTALL)
    assert len(alts) == page.count("<img") > 5 and all(len(alt) > 10 for alt in alts)
    assert "No description" not in page
    assert page.count('src="data:image/png;base64,') == page.count("<img")
    assert page.count("<figcaption>") == len(list((smoke / "figures").glob("*.png")))
    assert page.count("<math") == page.count("</math>") > 3 and "$$" not in page
    assert all("<mi>" in formula or "<mn>" in formula for formula in re.findall("<math.*?</math>", page, re.DOTALL))
    assert "Settings and provenance" in page


def test_a_report_of_a_notebook_that_stopped(smoke, tmp_path):
    folder = shutil.copytree(smoke, tmp_path / "run")
    with pytest.raises(reproduce.NotebookError):
        reproduce.reproduce("smoke", str(folder), {"tuned_layers": 9}, reproduce.NOTEBOOKS[1:2])
    page = report.report(folder).read_text(encoding="utf-8")
    assert "was encountered" not in page.split("01 · ")[0] and page.count("This notebook stopped with an error") == 1
    (folder / "results" / "01_prepare_the_data.json").write_text("{}")
    with pytest.raises(ValueError, match="01_prepare_the_data.json is damaged: remove it"):
        report.report(folder)
