"""Words and numbers that a hostile user brings: in titles, settings, parameters, histories and on the command line."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from matplotlib.figure import Figure
from nbformat import v4
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import explorers
from flowerlib import rewards
from flowerlib.lab import launch, report, reproduce, runs, store
from flowerlib.lab.settings import FIT_LOSSES, FIT_PATHS, PROFILES, Settings
from flowerlib.train import TrainSettings
from flowerlib.tree import Beams, recommend

from tiny_world import TITLES, finished_training, tiny_world

HARD = bool(os.environ.get("FLOWERLIB_HARD"))
MARKUP = [
    "x<b>y", "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[x](javascript:alert(1))",
    "![x](javascript:alert(1))", "<javascript:alert(1)>", "https://example.org", "javascript://x/%0aalert(1)",
    '" onmouseover="alert(1)', "' onfocus='alert(1)", "`</code><b>x</b>", "a `b` c", "*a* **b** _c_ __d__ ~~e~~",
    "a | b | c", "$x$ and $$y$$", "$\\href{javascript:alert(1)}{x}$", "\\(x\\) \\\\[y\\\\] \\begin{a}b\\end{a}",
    "&lt;b&gt; &amp;", "&#60;b&#62;", "[a]: javascript:alert(1)", "[x][y] [^1]", "--><b>", "]]><b>", "</td></table><b>",
    "</figcaption><b>", "\\<b\\>x", "a\\", "{{ 7 * 7 }}{% raw %}", "\u202e<b>", "＜b＞", "<b", "$", "$5 and $6",
]
LINES = ["a\n\n<b>c</b>", "a\n\n[x](javascript:alert(1))", "a\n# b", "a\n- b\n- c", "a\n\n    b", "a\r\rb [x](y)",
         "a\n===\n"]

TOGETHER = ["$", " ".join(MARKUP), "".join(reversed(MARKUP))]  # the quick part


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
        self.words.append(text.replace("\u00a0", " "))


def run_that_says(folder, text, lines):
    """A run made by hand with `text` in every place that the report prints, and `lines` where there may be several."""
    names = [f.name for f in fields(PROFILES["smoke"]) if type(f.default) is str]
    settings = asdict(PROFILES["smoke"]) | dict.fromkeys(names, text) | {"prompt": lines}
    source = {"settings": settings, "commit": text, "device": lines, "versions": {"torch": text}, "seconds": 1.0}
    lists = {"method": text, "decoding": text, "seen": text, "seed": 0, "n_users": 3, "h_bits": 1.0, "distinct": 2}
    for name in ("ndcg@10", "hr@10", "dgu"):
        lists |= dict.fromkeys((name, f"{name}_lo", f"{name}_hi"), 0.5)
    fit = {"n_titles": 3, "target": "counts", "method": "sft", "paths": "reward", "budget": 1, "kl_target_model": 0.5,
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
        told = [shown, v4.new_output("stream", text=lines),
                v4.new_output("error", ename=text, evalue=text, traceback=[lines]),
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


@pytest.mark.parametrize("lines", LINES if HARD else ["\n\n".join(LINES)])
def test_lines_in_a_report_are_words(tmp_path, harmless, lines):
    page = Elements(report.report(run_that_says(tmp_path, "harmless", lines)).read_text(encoding="utf-8"))
    assert page.elements == harmless.elements
    assert not [address for address in page.addresses if "javascript" in address]


# Settings, parameters, command lines

NUMBERS = [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**30, -(10**30), 10**400, "1", "x", None, True, [1], {}, 1j]
NONSENSE = {
    float: NUMBERS,
    int: [*NUMBERS, -1, 2.5, 1.0, 1e3],
    bool: [0, 1, "yes", "True", None, 1.0, []],
    str: [" ", "\t", "\n", "a\nb\x1b[31m", "\0", "a\0b", "\ud800", "a\u2028b", "x" * 5_000, 3, 2.5, None, True, b"x",
          ["x"], {}],
    tuple: ["sft", 3, None, True, {}, {"a": 1}, [["x", "y", "z"]], [None], [math.nan], [{}], [[]], [[math.inf, 0.5]],
            [[0, math.nan]], ["sft", 3], [["sft"]], range(2), {1, 2}, [10**400], [[10**400, 0.5]], [[1j, 0.5]],
            [b"x"]],
}
BLANK, LINE_BREAK = {"data_path", "counts_path"}, {"prompt"}  # may be empty; may have several lines
CHOICES = {f.name for f in fields(Settings) if f.metadata.get("choices")}
CASES = [(f.name, value) for f in fields(Settings) for value in NONSENSE[type(f.default)]]
CASES += [(f.name, value) for f in fields(Settings) if type(f.default) is str and f.name not in CHOICES
          for value in ["", "a\nb"] if not (value == "" and f.name in BLANK or value and f.name in LINE_BREAK)]
POSITIVE = ("epochs", "learning_rate", "preference_learning_rate", "temperature", "kl_weight", "batch_size", "n_beams",
            "max_history", "budget", "n_seeds", "fit_titles", "n_paths")
CASES += [(name, 0) for name in POSITIVE]
CASES += [(name, []) for name in ("methods", "fit_paths", "guides", "sweep")]
OF_TRAINING = {f.name for f in fields(TrainSettings)}


@pytest.mark.parametrize("name", [f.name for f in fields(Settings)])
def test_a_setting_takes_no_nonsense(name):
    """Wrong types, no numbers, numbers out of range, no text, several lines: one sentence that names the setting."""
    for value in [value for of, value in CASES if of == name]:
        for own in (PROFILES["smoke"], TrainSettings()):
            if isinstance(own, Settings) or name in OF_TRAINING:
                with pytest.raises(ValueError, match=name) as told:
                    replace(own, **{name: value})
                assert type(told.value) is ValueError and "\n" not in str(told.value), (name, value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.integers(-3, 20) | st.floats() | st.text()
    | st.sampled_from([value for values in NONSENSE.values() for value in values] + MARKUP + LINES)
    | st.sampled_from([0, 1, 1.0, 1e-9, 1e-12, 10**9, 10_000, 100, -100, 4_000 * "x", *FIT_LOSSES, *FIT_PATHS]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=6)


@given(st.sampled_from(CASES) | st.tuples(st.sampled_from([f.name for f in fields(Settings)]), JSON))
@examples(max_examples=20_000 if HARD else 600, deadline=None)
def test_any_value_is_refused_in_a_sentence_or_kept_as_it_is(given):
    """What is taken survives the way to a file and back, has the setting's type, and is finite, or of one line."""
    name, value = given
    try:
        own = replace(PROFILES["smoke"], **{name: value})
    except ValueError as error:
        assert type(error) is ValueError and name in str(error) and "\n" not in str(error)
        return
    kept = getattr(own, name)
    assert Settings(**json.loads(json.dumps(asdict(own), allow_nan=False))) == own and hash(own)
    assert type(kept) is type(getattr(PROFILES["laptop"], name))
    if type(kept) is tuple:
        value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    assert kept == value
    if type(kept) is str:
        kept.encode()  # no half of a surrogate pair
        assert (name in LINE_BREAK or len(kept.splitlines()) == len(kept[:1])) and "\x1b" not in kept
    if type(kept) in (int, float):
        assert abs(kept) < 2**32


def test_the_edges_of_the_ranges_are_allowed():
    allowed = {
        "epochs": [1e-9, 1, 10**9], "learning_rate": [1e-12, 1], "alpha": [-100, 0, 100], "beta": [0, 100],
        "theta": [0, 1], "seed": [0, 2**32 - 1], "category": ["Bücher & Hörspiele", "映画", "x<b>y", "a\tb"],
        "data_path": ["", "a\u00a0b", "a/x"], "prompt": ["a\nb\n", "x" * 4_000], "n_beams": [1, 10_000],
        "flower_sweep": [[["none", 0]], (("add", 0.9),)], "sweep": [[[100, 0]], ((-100, 0.9),)], "guides": [[0], (1,)],
    }
    for name, values in allowed.items():
        for value in values:
            replace(PROFILES["smoke"], **{name: value})


@pytest.mark.parametrize(("notebook", "given"), [
    (reproduce.BY_HAND, {"STEPS": 0}), (reproduce.BY_HAND, {"STEPS": "many"}), (reproduce.BY_HAND, {"N_DRAWS": 2.5}),
    (reproduce.BY_HAND, {"N_DRAWS": math.inf}), (reproduce.BY_HAND, {"SEED": -1}), (reproduce.BY_HAND, {"SEED": None}),
    (reproduce.CURVES, {"system": "a\nb"}), (reproduce.CURVES, {"recommended_path": 3}),
    (reproduce.CURVES, {"interactions_path": ["a"]}), (reproduce.SPEED, {"n_random_titles": 0}),
    (reproduce.SPEED, {"bench_path": True}), (reproduce.EXPLORERS, {"user": -1}), (reproduce.EXPLORERS, {"user": "me"}),
    (reproduce.EXPLORERS, {"demo_budget": 0}), (reproduce.EXPLORERS, {"demo_loss": None}),
    (reproduce.EXPLORERS, {"title": 7}),
    (reproduce.NOTEBOOKS[0], {"category": ""}), (reproduce.NOTEBOOKS[1], {"epochs": math.inf}),
    (reproduce.FIT, {"prompt": ""}), (reproduce.COMPARISON, {"guides": [math.nan]}),
])
def test_a_parameter_is_refused_before_anything_runs(tmp_path, notebook, given):
    (name,) = given
    with pytest.raises(ValueError, match=name) as told:
        reproduce.reproduce("smoke", str(tmp_path / "run"), given, [notebook])
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [reproduce.main, launch.main])
@pytest.mark.parametrize(("given", "told"), [
    (["-p", "epochs"], "'epochs' is not NAME=VALUE"), (["-p", "=3"], "'=3' is not NAME=VALUE"),
    (["-p", ""], "'' is not NAME=VALUE"), (["-p", "=" * 9], "is not NAME=VALUE"),
    (["-p", "epochs=1e999"], "epochs is inf: it must lie between 1e-09 and 1,000,000,000"),
    (["-p", "epochs={[]: 1}"], "setting epochs takes a float"), (["-p", "epochs="], "setting epochs takes a float"),
    (["-p", "epochs=" + "(" * 10_000], "setting epochs takes a float"),
    (["-p", "epochs=" + "-" * 100_000 + "1"], "setting epochs takes a float"),
    (["--out", ""], "OUT is '', the project's own folder"), (["--out", "."], "the project's own folder"),
    (["--out", "notebooks/.."], "the project's own folder"),
])
def test_a_command_line_ends_in_one_sentence(monkeypatch, capsys, tmp_path, main, given, told):
    runs.finish(tmp_path, "data", PROFILES["smoke"])
    method = ["SFT"] * (main is launch.main)
    out = [] if "--out" in given else ["--out", str(tmp_path)]
    monkeypatch.setattr(reproduce, "_run_all", lambda *_: pytest.fail("it runs"))
    monkeypatch.setattr("sys.argv", ["program", *method, "--profile", "smoke", *out, *given])
    with pytest.raises(SystemExit) as end:
        main()
    last = capsys.readouterr().err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert told in last and "error: " in last and "\n" not in last


def test_the_project_is_no_run(monkeypatch):
    """Its own notebooks would be taken for executed ones, or be written over."""
    before = sorted(store.ROOT.iterdir())
    for out in ("", "."):
        monkeypatch.setattr("sys.argv", ["report", "--out", out])
        with pytest.raises(SystemExit, match="holds no executed notebook"):
            report.main()
    assert sorted(store.ROOT.iterdir()) == before


# Recommend, beams, rewards


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    finished_training(folder)
    return folder


@pytest.mark.parametrize("k", [2.5, 1.0, "3", None, True, False, 0, -1, [3], math.nan, math.inf, 1j, np.float64(3),
                               np.True_])
def test_k_is_a_whole_number(trained, k):
    with pytest.raises(ValueError, match="k is .*: ask for a whole number of titles, one at least"):
        recommend(trained, ["Heat"], k)


def test_any_whole_number_is_enough(trained):
    three = recommend(trained, ["Heat"], 3)
    assert len(three) == 3
    for k in (np.int64(3), np.int8(3), np.uint32(3)):
        pd.testing.assert_frame_equal(recommend(trained, ["Heat"], k), three)
    for k in (1_000, 10**12):  # more than there are
        assert len(recommend(trained, ["Heat"], k)) == len(set(TITLES)) - 1
    for history in ("Heat", ("Heat",), np.array(["Heat"]), np.array([103]), pd.Series(["Heat"]), pd.Index([103]),
                    [np.int64(103)]):
        pd.testing.assert_frame_equal(recommend(trained, history, 3), three)


@pytest.mark.parametrize("history", [
    None, 3, 2.5, True, {}, {"Heat": 1}, {"Heat"}, pd.DataFrame({"title": ["Heat"]}), np.array([["Heat"]]),
    np.array("Heat"), iter(["Heat"]), object(), torch.tensor([103]),
])
def test_a_history_is_a_list(trained, history):
    kind = type(history).__name__
    with pytest.raises(ValueError, match=f"the history is a {kind}: give a flat list of item ids or titles"):
        recommend(trained, history)


@pytest.mark.parametrize("entry", [
    None, math.nan, np.nan, pd.NA, pd.NaT, ["Heat"], ("Heat",), {"Heat"}, {}, [], np.array(["Heat"]), [["Heat"]], 99,
    2.5, "", "\n", "<b>", "\ud800", b"Heat", object(), "x" * 10_000, pd.Timestamp(0),
])
def test_an_entry_is_an_id_or_a_title(trained, entry):
    for history in ([entry], ["Heat", entry], (entry, "Heat")):
        with pytest.raises(ValueError, match="is neither an item id nor a title of .*items.parquet") as told:
            recommend(trained, history)
        assert "\n" not in str(told.value)


def test_an_empty_value_is_no_title(tmp_path):
    """A film may be called None or nan."""
    finished_training(tmp_path, ["None", "nan", "<NA>", "Heat"])
    for entry in (None, math.nan, pd.NA):
        with pytest.raises(ValueError, match="is neither"):
            recommend(tmp_path, [entry])
    assert len(recommend(tmp_path, ["None", "nan"])) == 2


def test_a_run_is_a_finished_training(tmp_path, trained):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    runs.finish(tmp_path, "data", PROFILES["smoke"])
    store.keep(tmp_path / "p_ui" / "made.json", {}, {"commit": "0", "settings": {}})  # as a preference model lies there
    (tmp_path / "sft" / "SFT-1" / "checkpoints").mkdir(parents=True)
    for run in ("file", "empty", "data", "p_ui", "sft", "sft/SFT-1", "missing", "", "file/below"):
        with pytest.raises(FileNotFoundError) as told:
            recommend(tmp_path / run, ["Heat"])
        assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)
    for run in (None, 3, "", b"x"):
        with pytest.raises(FileNotFoundError, match="holds no finished training"):
            recommend(run, ["Heat"])


@pytest.mark.parametrize("given", [
    {"n": 2.5}, {"n": "3"}, {"n": None}, {"n": True}, {"n": 0}, {"n": -1}, {"n": math.nan}, {"n": 3.0},
    {"temperature": 0}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": -1},
    {"guide": math.nan}, {"guide": 1.5}, {"guide": -0.1},
])
def test_beams_take_no_nonsense(given):
    with pytest.raises(ValueError, match="need a whole n >= 1, a finite temperature > 0 and guide from 0 to 1"):
        Beams(**given)
    assert Beams(np.int64(3)).n == 3


def test_rewards_are_finite():
    catalogue = tiny_world("sequence")[1]
    counts, log_p = torch.ones(len(TITLES)), torch.zeros(1, len(catalogue.trie.leaves))
    for bad in (math.nan, math.inf, -math.inf):
        for given in ({"alpha": bad}, {"smoothing": bad}):
            with pytest.raises(ValueError, match="smoothing is .* and alpha .*: both must be finite"):
                rewards.count_log_rewards(catalogue.trie, counts, **given)
        for reward in ("div", "add"):
            with pytest.raises(ValueError, match="a finite strength"):
                rewards.tilted(torch.zeros(1, 2), log_p, torch.tensor([0]), reward, bad)


# The server of `make lab`


def answer(address):
    """Status and final address of a request."""
    try:
        with urllib.request.urlopen(address, timeout=5) as page:
            return page.status, page.url
    except urllib.error.HTTPError as error:
        return error.code, error.url


def test_the_lab_is_on_loopback_and_behind_a_token(tmp_path):
    """Whatever address the user's own Jupyter listens on, and for root as well."""
    if os.name != "posix" or shutil.which("make") is None:
        pytest.skip("no make here")
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        pytest.skip(f"no port on loopback can be had: {error}")
    quiet = {"open_browser": False}
    careless = {"ServerApp": quiet | {"ip": "0.0.0.0", "port": 0}, "ExtensionApp": quiet}
    store.write_json(tmp_path / "config" / "jupyter_server_config.json", careless)
    places = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "RUNTIME")}
    env = os.environ | places | {"JUPYTER_TOKEN": "", "JUPYTER_IP": "0.0.0.0", "HOME": str(tmp_path)}
    command = ["make", "-o", ".venv/ready", "lab", f"BIN={Path(sys.executable).parent}"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(
        command, cwd=store.ROOT, env=env, stdout=log, stderr=log, start_new_session=True
    ) as server:
        try:
            end = time.monotonic() + 60  # it takes 3 seconds on an idle machine
            while "token=" not in (said := (tmp_path / "log").read_text()) and server.poll() is None:
                assert time.monotonic() < end, said
                time.sleep(0.1)
            assert server.poll() is None, said
            (started,) = (tmp_path / "runtime").glob("jpserver-*.json")
            here = json.loads(started.read_text())
            address, token = here["url"], here["token"]
            assert token and address.startswith("http://127.0.0.1:")
            assert token in said  # for who has no browser
            while True:  # it says so a moment before it listens
                with suppress(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", here["port"]), timeout=2).close()
                    break
                assert time.monotonic() < end and server.poll() is None, said
                time.sleep(0.1)
            for elsewhere in {"127.0.0.2", *socket.gethostbyname_ex(socket.gethostname())[2]} - {"127.0.0.1"}:
                with pytest.raises(OSError):
                    socket.create_connection((elsewhere, here["port"]), timeout=2).close()
            for wrong in ("", "?token=", "?token=0", "?token=None"):
                assert answer(f"{address}api/contents{wrong}")[0] == 403
                assert "/login" in answer(f"{address}lab{wrong}")[1]
            assert answer(f"{address}api/contents?token={token}")[0] == 200
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)  # its own group: make, and the server below it


# Explorers


def test_words_in_an_explorer_are_words():
    """Names of a user's own files stand in a table below the figure, the message of an error in its place."""
    slots = {"method": "SFT", "decoding": "beam", "user": 0, "place": [1, 2], "title": ["a", "b"], "hit": False}
    slots = pd.DataFrame(slots)
    counts = pd.Series({f"<b>{i}" if i > 1 else "ab"[i]: 9.0 - i for i in range(9)})
    for text in TOGETHER[1:]:
        text = text.replace("$", "")
        table = explorers.draw_popularity(Figure(), slots, counts, ["SFT"], "beam", 2, {text: pd.Series(["a"])}).to_html()
        plain = explorers.draw_popularity(Figure(), slots, counts, ["SFT"], "beam", 2, {"x": pd.Series(["a"])}).to_html()
        assert Elements(table).elements == Elements(plain).elements and text in "".join(Elements(table).words)

        def refuse(*_, message=text):
            raise ValueError(message)

        below = explorers.live(refuse, {}).children[2]
        assert Elements(below.value).elements == [("b",)] and "".join(Elements(below.value).words) == text
