import json
import re

import nbformat
import pytest

from flowerlib import publish, reproduce, runs, tables


def notebook(*cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, **more) for source, more in cells])


def test_outputs_come_over_without_noise_and_injected_parameters(tmp_path):
    text = nbformat.v4.new_output("stream", name="stdout", text="1\n")
    bar = nbformat.v4.new_output("stream", name="stderr", text="100%")
    value = nbformat.v4.new_output("execute_result", data={"text/plain": "2"}, execution_count=3)
    source, executed = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    nbformat.write(notebook(("x = 1", {}), ("x + 1", {})), source)
    injected = ("x = 2", {"metadata": {"tags": ["injected-parameters"]}, "execution_count": 2})
    ran = [("x = 1", {"outputs": [text, bar]}), injected, ("x + 1", {"outputs": [value], "execution_count": 3})]
    nbformat.write(notebook(*ran), executed)
    publish.copy_outputs(executed, source)
    cells = nbformat.read(source, as_version=4).cells
    assert [cell.execution_count for cell in cells] == [1, 2]
    assert cells[0].outputs == [text] and cells[1].outputs[0].execution_count == 2
    nbformat.write(notebook(("x = 3", {}), ("x + 1", {})), source)
    with pytest.raises(ValueError, match="a.ipynb has changed since"):
        publish.copy_outputs(executed, source)


def test_tables_by_hand(tmp_path):
    row = {"method": "SFT", "decoding": "beam_normalised", "seen": "excluded", "mgu": 0.05, "h_bits": 7.123, "ttr": 0.1,
           "distinct": 20.0, "gini": 0.9, "ndcg@1": 0.1}
    row |= {f"{name}{end}": v for name in ("hr@10", "ndcg@10", "dgu") for end, v in (("", 0.2), ("_lo", 0.1), ("_hi", 0.3))}
    runs.write_results(tmp_path / "r.json", [row | {"method": "Flower"}, row], {})
    lines = tables.comparison_table(tmp_path / "r.json").splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2] == ("| beam, length-normalised, excluded | SFT | 0.200 [0.100, 0.300] | 0.200 [0.100, 0.300] | "
                        "0.200 [0.100, 0.300] | 0.050 | 7.12 | 0.100 | 20 | 0.900 |")
    assert "Flower" in lines[3]
    fit = {"n_titles": 100, "target": "counts", "method": "sft", "paths": "reward", "budget": 9, "kl_model_target": 0.1,
           "js": 0.01, "catalogue_mass": 0.98765, "forward_tokens": 24010, "seconds": 61.7}
    fits = [fit | {"kl_target_model": kl} for kl in (0.3, 0.1, 0.2)] + [fit | {"method": "subtb", "kl_target_model": 0.05}]
    runs.write_results(tmp_path / "f.json", fits, {})
    assert tables.fit_table(tmp_path / "f.json").splitlines()[2:] == [
        "| 100, counts | Flower (SubTB) | 0.05 | one seed | 0.1 | 0.01 | 0.988 | 24,010 | 62 |",
        "| 100, counts | SFT | 0.2 | 0.1, 0.3 | 0.1 | 0.01 | 0.988 | 24,010 | 62 |"]
    entry = {"seconds": 10.4, "peak_mb_so_far": 1500, "matmul_1024_seconds": 0.01}
    runs.write_json(tmp_path / "t.json", dict.fromkeys(reproduce.NOTEBOOKS, entry))
    assert tables.timing_table(tmp_path / "t.json", reproduce.NOTEBOOKS).splitlines()[-1] == "| **together** | **42** | peak memory 1.5 GB |"
    assert publish.between("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"


def test_the_readme_states_what_the_results_files_hold():
    text = publish.README.read_text(encoding="utf-8")
    written = {"comparison": tables.comparison_table(publish.FIGURES / "04_bias_and_diversity.json"),
              "timings": tables.timing_table(publish.FIGURES / "timings.json", reproduce.NOTEBOOKS),
              "fit": tables.fit_table(publish.FIGURES / "05_fit_a_known_distribution.json"),
              "next": tables.next_table(publish.FIGURES / "07_which_title_next.json"),
              "speed": tables.speed_table(publish.FIGURES / "08_bench.json")}
    for mark, table in written.items():
        assert publish.between(text, mark, table) == text
    assert publish.with_run_times(text, publish.FIGURES / "timings_smoke.json") == text
    assert not re.search(r"\bT\d\d\b|[A-Z]+-[A-Z]+-TEXT", text), "a place that waits for a number"
    for name in re.findall(r"figures/[\w.]+", text):
        assert (runs.ROOT / name).is_file(), name
    profiles = {json.loads(path.read_text())["provenance"]["settings"]["profile"]
                for path in publish.FIGURES.glob("0*.json") if path.name[:2] != "00" and path.name != "08_bench.json"}
    assert profiles == {"laptop"}
