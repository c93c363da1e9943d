"""For maintainers: puts what `make study` has run into the repository: `python notebooks/publish.py [notebook …]`.

Without names 00–04, 07 and 09; the times of smoke and laptop are then taken anew, from scratch. With 07 goes what is
left in runs/study-video_games, where it has run on the paper's data."""

import argparse
import re
import shutil
import time
from pathlib import Path

import nbformat

from flowerlib.lab import report, runs, store
from flowerlib.lab.reproduce import (BENCH, BY_HAND, COMPARISON, EXPLORERS, FOLDER, NOTEBOOKS, SPEED, STUDIES,
                                     NotebookError, reproduce, times_file)
from flowerlib.lab.settings import PROFILES

ONE_RUN = (*NOTEBOOKS, BY_HAND, EXPLORERS, COMPARISON)  # published together
SHORT = ("Next choices", "Preference", "Preference, α while decoding", "SFT", "SFT, α while decoding", "Flower",
         "Flower-KL")
RUNS, FIGURES = store.ROOT / "runs", store.ROOT / "figures"
PAGES = (store.ROOT / "README.md", FIGURES / "README.md", FOLDER / "README.md")


def copy_outputs(executed: Path, source: Path) -> None:
    """Puts the outputs of an executed notebook into its source, without progress bars and injected parameters."""
    ran, notebook = nbformat.read(executed, as_version=4), nbformat.read(source, as_version=4)
    given = [c for c in ran.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    if [c.source for c in given] != [c.source for c in cells]:
        raise ValueError(f"{source.name} has changed since {executed} ran: run it again")
    for number, (cell, old) in enumerate(zip(cells, given), 1):
        cell.update(execution_count=number, outputs=[output for output in old.outputs if not report.is_noise(output)])
        for result in (output for output in cell.outputs if "execution_count" in output):
            result.execution_count = number
    with store.atomic(source) as new:
        nbformat.write(notebook, new)


def filled(page: str) -> str:
    """A page with the tables between <!-- mark --> and <!-- /mark -->, and the seconds behind the notebooks, anew."""
    rows = {path.stem: runs.read_results(path) for path in FIGURES.glob("0[1-8]_*.json")}
    studies = {"MovieLens-100K": "07_which_title_next", "Video Games": "07_video_games_which_title_next"}
    studies = {data: rows[name] for data, name in studies.items() if name in rows}
    short = [{key: value for key, value in row.items() if key not in report.SETTINGS}
             for row in studies["MovieLens-100K"] if row["method"] in SHORT and row["seen"] == "excluded"
             and row["decoding"] != "beam_normalised"]
    depth = [row | {"method": f"{row['data']}, {row['model']}: {row['method']}"} for row in rows["07_depth"]]
    less = "decoding seen trainings HR@10 top_vs_history MGU_NEXT mgu ttr gini".split()
    cells = "flow reward alpha theta counts paths ndcg@10 dgu top_vs_next mgu_next h_bits distinct".split()
    tables = {
        "verdict": report.verdict_table(rows["05_fit_a_known_distribution"], studies),
        "design": report.markdown(rows["07_design"], cells),
        "results": report.lists_table(short, *less),
        **{mark: report.lists_table(of, "mgu", "ttr", "gini")
           for mark, of in [*zip(("next", "video_games"), studies.values()), ("depth", depth)]},
        "fit": report.fit_table(rows["05_fit_a_known_distribution"]), "speed": report.speed_table(rows["08_bench"]),
        "timings": report.timing_table(store.read_json(FIGURES / "timings.json"), NOTEBOOKS)}
    for mark, table in tables.items():
        page = re.sub(rf"(?s)(?<=<!-- {mark} -->\n).*?(?=<!-- /{mark} -->)", lambda _: f"{table}\n", page)
    for name, entry in store.read_json(FIGURES / "timings_smoke.json").items():
        page = re.sub(rf"(?m)^(\| \[?`{Path(name).stem}`.*\|) [^|]* \|$", rf"\1 {entry['seconds']:.0f} |", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", choices=[*ONE_RUN, *STUDIES, []], metavar="notebook")
    names, copies = parser.parse_args().notebooks or ONE_RUN, {}
    if SPEED in names:
        copies[BENCH] = "08_bench.json"
        if not BENCH.exists():
            parser.error(f"{SPEED} shows what this machine has measured: run `make bench` first")
    folder, timed = RUNS / "study", {"smoke": (*NOTEBOOKS, BY_HAND, *STUDIES), "laptop": NOTEBOOKS}
    try:
        for profile, of_profile in timed.items() if names is ONE_RUN else ():
            if (run := RUNS / f"timed-{profile}").exists():
                print("the last run is now in", run.rename(f"{run}-{time.strftime('%Y-%m-%d-%H%M%S')}"))
            reproduce(profile, str(run), {}, of_profile)
            copies[run / "timings.json"] = times_file(PROFILES[profile])
        reproduce("study", str(folder), {}, names)
    except NotebookError as error:
        parser.error(str(error))
    for name in names:
        copy_outputs(folder / "notebooks" / name, FOLDER / name)
        for pattern in (f"figures/{name[:2]}_*.png", f"results/{name[:2]}_*.json"):  # no lists of users
            copies |= {path: path.name for path in folder.glob(pattern)}
    for run in (folder, *RUNS.glob("study-video_games")) if COMPARISON in names else ():
        prefix = f"07{run.name[5:].replace('-', '_')}_"
        copies |= {path: prefix + path.name[3:] for kind in ("figures/07_*.png", "results/07_*.json")
                   for path in run.glob(kind)}
        for kind in ("lists", "preference", "exact"):  # unpacked into a run, they are not made anew
            if (run / kind).exists():
                shutil.make_archive(str(FIGURES / f"{prefix}{kind}"), "xztar", run, kind)
    for path, name in copies.items():
        shutil.copy(path, FIGURES / name)
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{len(names)} notebooks, {FIGURES.name}/ and the pages hold the run in {folder}")


if __name__ == "__main__":
    main()
