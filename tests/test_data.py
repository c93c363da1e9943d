"""Titles, splits, leaves and counts, against naive references."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib import data
from flowerlib.lab import training

prove = settings(max_examples=60, deadline=None, derandomize=True)


def frame(rows):
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


def lists(rows):
    return [list(history) for history in rows.history]


# --- titles ---


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tb\r\n c\u00a0d\x00e\u2028f ", "a b c d e f"),
        ("Tom &amp; Jerry &#39;s &#x41;", "Tom & Jerry 's A"),
        ("AT&T R&B; 3 < 4 > 2", "AT&T R&B; 3 < 4 > 2"),
        ("&amp;lt;b&amp;gt;x", "x"),  # escaped twice, and a tag in the end
        ("<i>Heat</i><br/>2<!-- no -->", "Heat 2"),
        ("x<script>var a = '<b>';</script>y", "x y"),
        ("🌻👩‍👩‍👧 ok", "🌻👩‍👩‍👧 ok"),
        ("שלום \u200fالعالم", "שלום \u200fالعالم"),
        ("Ame\u0301lie", "Amélie"),
        ("a\ud800b", "a b"),
    ],
)
def test_clean_title(raw, clean):
    assert data.clean_title(raw) == clean


@prove
@given(st.text(st.sampled_from("&ampltg;#39<>/b!- \t\n\u0301e\u00e9🌻") | st.characters(), max_size=30))
def test_cleaning_twice_is_cleaning_once(raw):
    clean = data.clean_title(raw)
    assert data.clean_title(clean) == clean == clean.strip()
    assert not any(c in clean for c in "\t\n\r\x00") and "  " not in clean


@pytest.mark.parametrize(
    ("raw", "moved"),
    [
        ("Matrix, The", "The Matrix"),
        ("Beautiful Mind, A", "A Beautiful Mind"),
        ("American in Paris, An", "An American in Paris"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Misérables, Les", "Misérables, Les"),
        ("The Matrix", "The Matrix"),
        (", The", ", The"),
    ],
)
def test_move_article(raw, moved):
    assert data.move_article(raw) == moved


@pytest.mark.parametrize(("title", "blank"), [("", True), (" \u200b\u2028\t", True), (" .", False), ("\u05e9", False)])
def test_is_blank(title, blank):
    assert data.is_blank(title) is blank


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


# --- leaves and digests ---


@prove
@given(st.lists(st.sampled_from(["Heat", "HEAT", "Fargo", "Alien", "\u0130"]), min_size=1))
def test_equal_titles_share_a_leaf_numbered_by_their_first_item(titles):
    order = list(dict.fromkeys(titles))
    for given_as in (titles, pd.Series(titles, range(5, 5 + len(titles)))):
        assert data.item_leaves(given_as).tolist() == [order.index(title) for title in titles]


def test_digest_of_names_what_is_learned_from():
    def tables(log, title="c"):
        items = pd.DataFrame({"item_id": [7, 8, 9], "title": ["a", "b", title]})
        return data.split_interactions(items, frame(log), "leave-one-out", 3)

    log = [["u", 7, 0], ["u", 8, 1], ["u", 9, 2], ["u", 7, 3], ["u", 8, 4], ["v", 8, 0], ["v", 9, 1]]
    base = tables(log)
    name = training.digest_of(base)
    assert len(name) == 12 and int(name, 16) >= 0
    assert training.digest_of(tables(log)) == name
    assert training.digest_of(replace(base, test=base.test.iloc[:0])) == name  # nothing is learned from test
    others = [
        tables(log, "d"),
        tables([["w", *row[1:]] if row[0] == "v" else row for row in log]),
        replace(base, train=base.train.iloc[:-1]),
        replace(base, train=base.train.iloc[::-1]),
        replace(base, valid=base.valid.assign(target=9)),
        replace(base, train=base.train.drop(columns="user_id")),
        replace(base, items=base.items.assign(item_id=["7", "8", "9"])),
    ]
    assert len({name, *map(training.digest_of, others)}) == 1 + len(others)
