"""Processed tables, splits and counts, against naive references and on the real MovieLens-100K."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from files import HEAD, RATES, jsonl, recbole, review
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib import assets, data, readers, runs

prove = settings(max_examples=60, deadline=None, derandomize=True)
FILMS = ["Toy Story", "Heat"]
RATED = [[1, 10, 5], [1, 20, 6], [2, 20, 7]]


def frame(rows):
    return pd.DataFrame(rows, columns=readers.INTERACTION)


def lists(rows):
    return [list(history) for history in rows.history]


def processed(folder, items=None, **parts):
    items = {"item_id": [10, 20, 30], "title": ["a", "b", "b"]} if items is None else items
    rows = {"history": [[10], [10, 20]], "target": [20, 30]}
    for name, table in ({"items": items} | dict.fromkeys(data.PARTS, rows) | parts).items():
        pd.DataFrame(table).to_parquet(folder / f"{name}.parquet")
    return folder


def test_processed_tables_of_others(tmp_path):
    tables = data.read_processed(processed(tmp_path))
    assert tables.items.title.tolist() == ["a", "b", "b"]
    assert lists(tables.train) == [[10], [10, 20]] and tables.train.target.tolist() == [20, 30]
    assert list(tables.test) == ["history", "target"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"items": {"item_id": [10]}}, r"items\.parquet has no column title"),
        ({"items": {"item_id": [10, 10], "title": ["a", "b"]}}, r"items\.parquet, row 1: item_id 10 stands there"),
        ({"items": {"item_id": [10, 20], "title": ["a", "\u200b"]}}, r"items\.parquet, row 1: the title of item 20 is"),
        ({"items": {"item_id": [10, 20], "title": ["a", None]}}, r"items\.parquet, row 1: the title is missing"),
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
        data.read_processed(processed(tmp_path, **tables))


def test_missing_and_truncated_processed(tmp_path):
    path = processed(tmp_path) / "valid.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"valid\.parquet is damaged or no Parquet file"):
        data.read_processed(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.parquet is missing"):
        data.read_processed(tmp_path)


@pytest.mark.parametrize("kind", [int, str])
def test_write_and_read_back(tmp_path, kind):
    items = pd.DataFrame({"item_id": list(map(kind, [7, 8, 9])), "title": ["🌻 x", "שלום", "c"]})
    interactions = frame([["u", kind(i), t] for t, i in enumerate([7, 8, 9, 7, 8])])
    tables = data.split_interactions(items, interactions, "leave-one-out", 2)
    for _ in range(2):  # the second time they replace the first
        data.write_processed(tables, tmp_path / "out")
    back = data.read_processed(tmp_path / "out")
    for name in ("items", *data.PARTS):
        old, new = getattr(tables, name), getattr(back, name)
        assert list(old) == list(new)
        for column in old:
            assert list(map(str, old[column])) == list(map(str, new[column]))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        f"{name}.parquet" for name in ("items", *data.PARTS)
    )
    assert (data.item_counts(back) == data.item_counts(tables)).all()
    assert lists(pd.read_parquet(tmp_path / "out" / "test.parquet")) == lists(tables.test)  # plain pandas reads it too
    tables.train.to_parquet(tmp_path / "out" / "train.parquet")  # as a pandas user would write it
    assert lists(data.read_processed(tmp_path / "out").train) == lists(tables.train)


# --- splits and counts ---

LOG = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 9)), max_size=40)
CATALOGUE = pd.DataFrame({"item_id": range(7), "title": list("abcdefg")})


def by_user(log):
    """Each user's (item, timestamp) in the order of time, the file's order within ties."""
    users = {}
    for user, item, when in log:
        users.setdefault(user, []).append((item, when))
    return {user: sorted(seen, key=lambda pair: pair[1]) for user, seen in users.items()}


def rows_of(tables, part):
    rows = getattr(tables, part)
    return list(zip(rows.user_id.tolist(), map(tuple, lists(rows)), rows.target.tolist(), rows.timestamp.tolist()))


@prove
@given(LOG, st.integers(1, 4))
def test_leave_one_out_is_the_naive_split(log, cap):
    tables = data.split_interactions(CATALOGUE, frame(log).astype(int), "leave-one-out", cap)
    expected = {part: [] for part in data.PARTS}
    for user, seen in by_user(log).items():
        for k in range(1, len(seen)):
            left = len(seen) - 1 - k if len(seen) >= 3 else 2
            part = ("test", "valid", "train")[min(left, 2)]
            history = tuple(item for item, _ in seen[max(0, k - cap) : k])  # what comes right before the target
            expected[part].append((user, history, *seen[k]))
    for part in data.PARTS:
        assert sorted(rows_of(tables, part)) == sorted(expected[part])


@prove
@given(LOG, st.integers(1, 4))
def test_time_split_has_no_leakage(log, cap):
    tables = data.split_interactions(CATALOGUE, frame(log).astype(int), "time", cap)
    rows = [rows_of(tables, part) for part in data.PARTS]
    expected = [
        (user, tuple(item for item, _ in seen[max(0, k - cap) : k]), *seen[k])
        for user, seen in by_user(log).items()
        for k in range(1, len(seen))
    ]
    n = len(expected)
    assert sorted(sum(rows, [])) == sorted(expected)
    assert [len(r) for r in rows] == [n * 8 // 10, n * 9 // 10 - n * 8 // 10, n - n * 9 // 10]
    whens = [when for part in rows for when in sorted(row[3] for row in part)]
    assert whens == sorted(whens)  # no training target is later than a validation or a test target


@prove
@given(LOG, st.integers(1, 4), st.sampled_from(data.SPLITS))
def test_sequences_put_the_rows_together_again(log, cap, how):
    tables = data.split_interactions(CATALOGUE, frame(log).astype(int), how, cap)
    flat, offsets = data.sequences(tables.train)
    found = sorted(flat[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True))
    rows = Counter(tables.train.user_id.tolist())
    expected = sorted([item for item, _ in by_user(log)[user][: n + 1]] for user, n in rows.items())
    assert found == expected
    counts = np.bincount(sum(expected, []), minlength=7)
    assert (data.item_counts(tables) == counts).all()


@prove
@given(LOG, st.integers(1, 4), st.sampled_from(data.SPLITS), st.sampled_from(data.PARTS))
def test_seen_is_all_that_came_before_the_target(log, cap, how, part):
    tables = data.split_interactions(CATALOGUE, frame(log), how, cap)
    users, rows = by_user(log), getattr(tables, part)
    seen = data.seen_positions(tables, part)
    position = {}
    for name in data.PARTS[: data.PARTS.index(part) + 1]:
        for k, user in enumerate(getattr(tables, name).user_id):
            position[user] = position.get(user, 0) + 1
            if name == part:
                assert set(seen[k]) == {item for item, _ in users[user][: position[user]]}
    assert len(seen) == len(rows)


def test_sequences_without_users_and_with_mixed_rows():
    rows = pd.DataFrame({"history": [[1], [4], [1, 2], [4, 5], [2, 3]], "target": [2, 5, 3, 6, 1]})
    flat, offsets = data.sequences(rows)
    assert flat.tolist() == [1, 2, 3, 1, 4, 5, 6] and offsets.tolist() == [0, 4, 7]
    rows = pd.DataFrame({"history": [[5], [5, 1], [1], [1, 2]], "target": [1, 2, 2, 9]})  # both end in 1, 2
    assert data.sequences(rows)[0].tolist() == [5, 1, 2, 9, 1, 2]  # the earliest goes on


def test_item_counts_by_hand():
    log = [["u", item, when] for when, item in enumerate([0, 1, 2, 3, 4, 5])] + [["v", 0, 0], ["v", 6, 1]]
    tables = data.split_interactions(CATALOGUE, frame(log), "leave-one-out", 2)
    # u's rows: 0→1, 01→2, 12→3 (4 is validation, 5 test); v's, who has two interactions only: 0→6
    assert data.item_counts(tables, "true").tolist() == [2, 1, 1, 1, 0, 0, 1]
    assert data.item_counts(tables, "windowed").tolist() == [3, 2, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="unknown counts 'all': choose true or windowed"):
        data.item_counts(tables, "all")


def test_refused_splits():
    with pytest.raises(ValueError, match="unknown split 'random': choose one of leave-one-out, time"):
        data.split_interactions(CATALOGUE, frame([]), "random", 3)
    with pytest.raises(ValueError, match="max_history is 0"):
        data.split_interactions(CATALOGUE, frame([]), "time", 0)


@prove
@given(LOG, st.integers(1, 4))
def test_k_core_is_the_largest_one(log, k):
    core = data.k_core(frame(log), k)
    rest = list(log)
    while True:
        users, items = Counter(r[0] for r in rest), Counter(r[1] for r in rest)
        weak = [r for r in rest if users[r[0]] < k or items[r[1]] < k]
        if not weak:
            break
        rest.remove(weak[0])
    assert core.to_numpy().tolist() == [list(row) for row in rest]


# --- load ---

OWN = replace(runs.settings("laptop"), dataset="own")


def test_load_slices_before_the_split(tmp_path):
    item = HEAD + "".join(f"{i}\tfilm {i}\n" for i in range(6))
    inter = RATES + "".join(f"{u}\t{i}\t{i}\n" for u in range(4) for i in range(6) if i != u)  # 4 and 5 by everybody
    folder = str(recbole(tmp_path, item, inter))
    tables = data.load(replace(OWN, data_path=folder, max_items=4, max_users=3))
    assert tables.items.item_id.tolist() == [0, 1, 4, 5]  # equal counts: the first ones
    assert tables.test.user_id.tolist() == [0, 1, 2] and set(tables.test.target) == {5}
    assert lists(tables.test) == [[1, 4], [0, 4], [0, 1, 4]]


def test_load_cuts_processed_histories(tmp_path, capsys):
    tables = data.load(replace(OWN, data_path=str(processed(tmp_path)), max_history=1, max_items=2))
    assert lists(tables.train) == [[10], [20]] and len(tables.items) == 3
    assert "max_items and max_users are not applied" in capsys.readouterr().out


def test_load_brings_amazon_to_its_5_core(tmp_path):
    asins = [f"A{i}" for i in range(6)]
    jsonl(tmp_path / "r.json.gz", *(review(f"u{u}", a, t) for u in range(5) for t, a in enumerate(asins)),
          review("once", "A0", 3), review("u0", "rare", 4))
    jsonl(tmp_path / "meta_r.json.gz", *({"asin": a, "title": a.lower()} for a in [*asins, "rare"]))
    tables = data.load(replace(OWN, data_path=str(tmp_path)))
    assert tables.items.item_id.tolist() == asins
    assert [len(getattr(tables, part)) for part in data.PARTS] == [15, 5, 5]


def test_load_refuses(tmp_path):
    with pytest.raises(ValueError, match="dataset 'own' isn't fetched: put it into a folder"):
        data.load(OWN)
    with pytest.raises(FileNotFoundError, match="is no folder: data_path counts from the project's root"):
        data.load(replace(OWN, data_path=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="holds no data that is understood: looked for items.parquet"):
        data.load(replace(OWN, data_path=str(tmp_path)))
    with pytest.raises(ValueError, match="leaves no row for train"):
        data.load(replace(OWN, data_path=str(recbole(tmp_path, inter=RATES + "1\t10\t5\n"))))


# --- the real data ---


def test_movielens_100k():
    try:
        items, interactions = readers.read_recbole(assets.movielens_100k())
    except assets.FetchError as error:
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
