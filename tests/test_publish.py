"""What goes from a run into the repository: outputs, files, tables; and that the pages say what the files hold."""

import json
import re
import shutil

import nbformat
import pytest

import publish
from flowerlib.lab import reproduce, runs, store


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


def test_each_table_goes_to_its_mark_and_the_seconds_to_their_notebook():
    marks = "".join(f"<!-- {mark} -->\nold\n<!-- /{mark} -->\n" for mark in ("results", "speed"))
    page = f"a\n{marks}b\n| [`02_train_sft`](02_train_sft.ipynb) | tune | 9 |\n| `no_such` | x | 9 |\n"
    new = publish.filled(page)
    assert "old" not in new and new.startswith("a\n<!-- results -->\n| method ") and "<!-- comparison -->" not in new
    assert new.count("\n<!-- /results -->\n<!-- speed -->\n| ours / the other way ") == 1
    seconds = store.read_json(publish.FIGURES / "timings_smoke.json")["02_train_sft.ipynb"]["seconds"]
    assert new.endswith(f"b\n| [`02_train_sft`](02_train_sft.ipynb) | tune | {seconds:.0f} |\n| `no_such` | x | 9 |\n")
    assert publish.filled(new) == new
    short = new.split("<!-- /results -->")[0].splitlines()[4:]
    assert 4 <= len(short) <= 9 and sum("| Preference " in line for line in short) == 1


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository of one notebook and one page, and a `reproduce` that leaves what the real one leaves."""
    folders = {name: tmp_path / name for name in ("runs", "figures", "notebooks")}
    for folder in folders.values():
        folder.mkdir()
    page = tmp_path / "README.md"
    page.write_text("# x\n")
    for name in publish.ONE_RUN:
        nbformat.write(notebook(("1", {})), folders["notebooks"] / name)
    calls = []

    def fake(profile, out, overrides, only):
        calls.append((profile, out, tuple(only)))
        folder = folders["runs"] / out
        for name in ("notebooks", "figures", "results", "lists", "preference"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "timings.json").write_text(f'{{"profile": "{profile}"}}')
        for name in only:
            nbformat.write(notebook(("1", {"execution_count": 1})), folder / "notebooks" / name)
            (folder / "notebooks" / f"{name[:2]}_a.json").write_text("what the runner notes of a notebook")
            (folder / "figures" / f"{name[:2]}_a.png").write_text(profile)
            (folder / "results" / f"{name[:2]}_a.json").write_text(profile)

    monkeypatch.setattr(publish, "reproduce", fake)
    monkeypatch.setattr(publish, "RUNS", folders["runs"])
    monkeypatch.setattr(publish, "FIGURES", folders["figures"])
    monkeypatch.setattr(publish, "FOLDER", folders["notebooks"])
    monkeypatch.setattr(publish, "PAGES", (page,))
    monkeypatch.setattr(publish, "BENCH", folders["runs"] / "bench.json")
    monkeypatch.setattr(publish, "filled", lambda text: text + "filled\n")
    return tmp_path, calls


def run(monkeypatch, *names):
    monkeypatch.setattr("sys.argv", ["publish", *names])
    publish.main()


def test_publishing_from_scratch_takes_the_times_anew_and_moves_finished_runs_aside(house, monkeypatch, capsys):
    root, calls = house
    for name in ("timed-laptop", "timed-smoke", "study"):
        (root / "runs" / name).mkdir()
        (root / "runs" / name / "work").write_text("hours")
    run(monkeypatch)
    aside = [path for path in (root / "runs").iterdir() if (path / "work").exists()]
    names = sorted(re.sub(r"-\d{4}-\d\d-\d\d-\d{6}$", "", path.name) for path in aside)
    assert names == ["study", "timed-laptop", "timed-smoke"]
    assert {path.name for path in aside} & {*names} == {"study"}  # whose work goes on
    said = capsys.readouterr().out
    assert all(f"the last run is now in {path}" in said for path in aside if path.name != "study")
    assert [(profile, only) for profile, _, only in calls[1:]] == [
        ("laptop", reproduce.NOTEBOOKS), ("study", publish.ONE_RUN)] and calls[0][0] == "smoke"
    figures = root / "figures"
    assert {path.name for path in figures.glob("*.png")} == {f"{name[:2]}_a.png" for name in publish.ONE_RUN}
    assert {path.read_text() for path in figures.glob("*_a.json")} == {"study"}
    of_laptop = figures / publish.times_file(publish.PROFILES["laptop"])
    assert json.loads(of_laptop.read_text())["profile"] == "laptop"
    assert json.loads((figures / "timings_smoke.json").read_text())["profile"] == "smoke"
    assert (root / "README.md").read_text() == "# x\nfilled\n"


def test_one_notebook_alone_takes_up_the_last_run(house, monkeypatch):
    root, calls = house
    run(monkeypatch, reproduce.NOTEBOOKS[3])
    assert calls == [("study", str(root / "runs" / "study"), reproduce.NOTEBOOKS[3:])]
    assert not list((root / "figures").glob("timings*.json"))
    with pytest.raises(SystemExit):
        run(monkeypatch, reproduce.SPEED)  # bench.json is missing
    assert len(calls) == 1


def test_what_a_study_has_made_is_packed_without_its_data(house, monkeypatch):
    root, _ = house
    study = root / "runs" / "study"
    kept = ("exact/SFT-1.json", "lists/SFT-1.json", "preference/p_ui-3/made.json")
    for name in (*kept, "data/train.parquet", "sft/SFT-1/made.json"):
        (study / name).parent.mkdir(parents=True, exist_ok=True)
        (study / name).write_text(name)
    run(monkeypatch, reproduce.COMPARISON)
    packed = sorted((root / "figures").glob("*.tar.xz"))
    assert [path.name for path in packed] == ["07_exact.tar.xz", "07_lists.tar.xz", "07_preference.tar.xz"]
    for path in packed:
        shutil.unpack_archive(path, root / "new")
    left = [path.relative_to(root / "new").as_posix() for path in (root / "new").rglob("*") if path.is_file()]
    assert sorted(left) == sorted(kept)
    assert (root / "new" / left[0]).read_text() == left[0]


def test_the_study_on_the_papers_data_goes_under_names_of_its_own(house, monkeypatch):
    root, calls = house
    made = ("lists/SFT-1.json", "preference/p_ui-3/made.json", "results/07_test.json", "figures/07_test.png")
    for name in made:
        path = root / "runs" / "study-video_games" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("video games")
    run(monkeypatch, reproduce.COMPARISON)
    assert len(calls) == 1  # nothing is run there
    found = {path.name for path in (root / "figures").glob("07_video_games_*")}
    assert found == {f"07_video_games_{name}" for name in ("lists.tar.xz", "preference.tar.xz", "test.json", "test.png")}
    assert (root / "figures" / "07_video_games_test.json").read_text() == "video games"


def test_the_pages_state_what_the_results_files_hold():
    texts = {page: page.read_text(encoding="utf-8") for page in publish.PAGES}
    for page, text in texts.items():
        assert publish.filled(text) == text, page
        assert not re.search(r"\bT\d\d\b|[A-Z]+-[A-Z]+-TEXT", text), f"{page}: a place that waits for a number"
    marks = re.findall(r"<!-- (\w+) -->\n", "".join(texts.values()))
    assert sorted(marks) == ["depth", "design", "fit", "next", "results", "speed", "timings", "verdict", "video_games"]
    for name in store.read_json(publish.FIGURES / "timings_smoke.json"):
        line = rf"(?m)^\| \[?`{name.removesuffix('.ipynb')}`.*\| \d+ \|$"
        assert len(re.findall(line, texts[publish.FOLDER / "README.md"])) == 1, name
    of_runs = [path for path in publish.FIGURES.glob("0[1-9]*.json") if path.name not in ("08_bench.json", "08_gpu.json")]
    profiles = {store.read_json(path)["provenance"]["settings"]["profile"] for path in of_runs}
    assert profiles == {"laptop", "study"}


def test_what_the_pages_name_is_there():
    for page in publish.PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"
        for name in re.findall(r"(?<![\w/])figures/([\w.]+)", text) + re.findall(r"\b\d\d_\w+\.(?:png|json)\b", text):
            assert (publish.FIGURES / name).is_file(), f"{page}: {name}"


def test_the_committed_results_use_the_methods_names():
    for path in publish.FIGURES.glob("0[147]_*.json"):
        assert {row["method"] for row in runs.read_results(path) if "method" in row} <= set(runs.METHODS), path
