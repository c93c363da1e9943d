"""Tables of items and interactions: titles cleaned, interactions split, leaves and counts of items.

The processed schema, one Parquet file per table (`flowerlib.lab.sources` reads and writes them):

| file | columns |
|---|---|
| items.parquet | item_id (integer or string, unique), title (string, not blank) |
| train.parquet, valid.parquet, test.parquet | history (list of item_id, oldest first, not empty), target (item_id) \
and, where known, user_id and timestamp (seconds) |

Several item ids may have one title: they share a leaf, see `item_leaves`."""

import html
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

PARTS = ("train", "valid", "test")
SPLITS = ("leave-one-out", "time")

_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);")
_TAG = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[a-zA-Z][^<>]*>", re.DOTALL | re.IGNORECASE)
_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_ARTICLE = re.compile(r"(.+), (The|An|A)")
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}


@contextmanager
def reading(path: str | Path, remove: str | Path | None = None) -> Iterator[None]:
    """The block reads what this project wrote at `path`; its error becomes one sentence with the cure: a ValueError, or
    FileNotFoundError where nothing is there. remove: what to remove for the cure, where that is more than `path`."""
    try:
        yield
    except Exception as error:  # every format has errors of its own
        of_the_file = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
        foreign = isinstance(error, (ImportError, MemoryError)) or re.search("(allocate|out of) memory", str(error))
        if foreign or getattr(error, "errno", None) and not of_the_file:
            raise  # no fault of the file
        kind, fault = (ValueError, "damaged") if Path(path).exists() else (FileNotFoundError, "missing")
        cure = f"remove {remove or 'it'} and run" if remove or fault == "damaged" else "run"
        cause = error.__cause__ or error
        cause = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise kind(f"{path} is {fault}: {cure} its notebook again ({cause:.120})") from error


def read_json(path: str | Path, *keys: str) -> Any:
    """What a JSON file holds: an object with these keys, if any are given. Errors as in `reading`."""
    with reading(path):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if keys and not (isinstance(value, dict) and {*keys} <= {*value}):
            raise ValueError(f"no object with {', '.join(keys)}")
    return value


@dataclass(frozen=True)
class Tables:
    """The processed tables (schema above). `history` is an Arrow list column: iterating over it yields lists."""

    items: pd.DataFrame
    train: pd.DataFrame
    valid: pd.DataFrame
    test: pd.DataFrame


def clean_title(title: str) -> str:
    """The title in Unicode NFC, HTML entities resolved, tags removed, white space and control characters one space.
    Other characters stay as they are, in any script. Cleaning a clean title changes nothing."""
    while True:
        new = unicodedata.normalize("NFC", _ENTITY.sub(lambda m: html.unescape(m[0]), title))
        new = _SPACE.sub(" ", _TAG.sub(" ", new)).strip()
        if new == title:
            return title
        title = new


def move_article(title: str) -> str:
    """MovieLens' `Matrix, The` as `The Matrix`; A and An too, foreign articles stay."""
    return _ARTICLE.sub(r"\2 \1", title) if _ARTICLE.fullmatch(title) else title


def is_blank(title: str) -> bool:
    """Whether a title shows nothing: it is empty, or white space and invisible characters alone."""
    return all(unicodedata.category(c) in _INVISIBLE for c in title)


def split_interactions(items: pd.DataFrame, interactions: pd.DataFrame, how: str, max_history: int) -> Tables:
    """Rows of (history, target, user_id, timestamp), one for every interaction with a predecessor, in three parts.
    A user's interactions are sorted by time, in the file's order where times are equal (MovieLens stamps rating
    sessions: half of its steps are ties). The history is the last `max_history` item ids before the target. Rows
    are ordered by user, in order of appearance, then by time. Raises ValueError: unknown `how`, max_history below 1.
    how="leave-one-out": a user's last interaction is test, the last but one validation, the rest training; users
    with fewer than three interactions are training only. how="time": the rows sorted by time over all users, the
    first 8/10 training, 1/10 validation, 1/10 test (the paper's split)."""
    if how not in SPLITS:
        raise ValueError(f"unknown split {how!r}: choose one of {', '.join(SPLITS)}")
    if max_history < 1:
        raise ValueError(f"max_history is {max_history}: a history needs at least one item")
    user = pd.factorize(interactions.user_id)[0]
    order = np.lexsort((interactions.timestamp.to_numpy(), user))
    rows, user = interactions.iloc[order].reset_index(drop=True), user[order]
    sizes = np.bincount(user)
    size, position = np.repeat(sizes, sizes), _within(sizes)
    if how == "leave-one-out":
        part = np.where(size >= 3, (position - size + 3).clip(0), 0)
    else:
        targets = np.flatnonzero(position > 0)
        ranked = targets[np.argsort(rows.timestamp.to_numpy()[targets], kind="stable")]
        part, n = np.zeros(len(rows), dtype=int), len(ranked)
        part[ranked[n * 8 // 10 :]] += 1
        part[ranked[n * 9 // 10 :]] += 1
    ids = pa.chunked_array([pa.array(rows.item_id)]).combine_chunks()

    def table(which: int) -> pd.DataFrame:
        index = np.flatnonzero((part == which) & (position > 0))
        lengths = np.minimum(position[index], max_history)
        flat = ids.take(pa.array(np.repeat(index - lengths, lengths) + _within(lengths)))
        offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int64())
        history = pd.arrays.ArrowExtensionArray(pa.LargeListArray.from_arrays(offsets, flat))
        columns = {"history": history, "target": rows.item_id.to_numpy()[index]}
        return pd.DataFrame(columns | {name: rows[name].array[index] for name in ("user_id", "timestamp")})

    return Tables(items.reset_index(drop=True), *map(table, range(3)))


def _within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … within each group of the given lengths, the groups one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def histories(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """All histories one after the other, (n,) item ids, and (len(rows)+1,) offsets: row k's is flat[o[k]:o[k+1]]."""
    column = pa.chunked_array([pa.array(rows.history)]).combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return column.flatten().to_numpy(zero_copy_only=False), np.r_[0, np.cumsum(lengths)].astype(np.int64)


def row_positions(tables: Tables, rows: pd.DataFrame) -> tuple[list[list[int]], list[int]]:
    """Histories and targets of a table's rows as positions in `tables.items`."""
    index = pd.Index(tables.items.item_id)
    flat, offsets = histories(rows)
    flat = index.get_indexer(flat).tolist()
    return [flat[a:b] for a, b in zip(offsets[:-1], offsets[1:])], index.get_indexer(rows.target).tolist()


def seen_positions(tables: Tables, part: str) -> list[list[int]]:
    """For each row of a part, the positions in `tables.items` of its user's items before the target, oldest first.
    Where the rows name their user, these are more than the history, which holds the last max_history items only."""
    before: dict[Any, dict[int, None]] = {}  # each user's items so far, in order
    for name in PARTS[: PARTS.index(part) + 1]:
        rows, result = getattr(tables, name), []
        users = rows.user_id if "user_id" in rows else range(len(rows))
        for user, history, target in zip(users, *row_positions(tables, rows), strict=True):
            seen = before.setdefault(user if "user_id" in rows else (name, user), {})
            seen.update(dict.fromkeys(history))
            result.append(list(seen) if name == part else [])
            seen[target] = None
    return result


def sequences(train: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The users' training sequences, put together from their rows: (n,) item ids and (m+1,) offsets.
    A row continues an earlier row if that one's history + target, cut to the longest history of the table, is its own
    history: the earliest such row, of the same user where user_id is there, that no other row continues. `a → b` and
    `a, b → c` become a, b, c. Users' rows may be mixed, but each user's must stand in the order of time. Every
    interaction appears once, if histories are the last max_history items and no row is missing."""
    flat, offsets = histories(train)
    codes, ids = pd.factorize(np.r_[flat, train.target.to_numpy()])
    past, following = (part.astype(np.int32).tobytes() for part in np.split(codes, [len(flat)]))
    users = pd.factorize(train.user_id)[0].tolist() if "user_id" in train else [0] * len(train)
    bounds, cap = (4 * offsets).tolist(), 4 * int(np.diff(offsets).max(initial=0))  # in bytes, four an item
    whole: list[bytearray] = []
    waiting: dict[tuple[int, bytes], list[bytearray]] = {}  # (user, end of a sequence) -> the sequences that end so
    for k, user in enumerate(users):
        history = past[bounds[k] : bounds[k + 1]]
        if ending := waiting.get((user, history)):
            sequence = ending.pop(0)
            if not ending:
                del waiting[user, history]
        else:
            sequence = bytearray(history)
            whole.append(sequence)
        sequence += following[4 * k : 4 * k + 4]
        waiting.setdefault((user, bytes(sequence[-cap:])), []).append(sequence)
    items = ids[np.frombuffer(b"".join(whole), np.int32)].astype(flat.dtype)
    return items, np.cumsum([0, *map(len, whole)]) // 4


def item_leaves(titles: Sequence[str] | pd.Series) -> np.ndarray:
    """(n_items,) leaf id of each item, from the items' titles. Equal titles share a leaf; leaves are numbered in the
    order in which their titles first appear: `Heat, Fargo, Heat` are 0, 1, 0. The title tree numbers them so too: a
    catalogue refuses a tokenizer that reads two titles alike."""
    return pd.factorize(pd.Series(titles, dtype=str))[0]


def item_counts(tables: Tables, how: str = "true") -> np.ndarray:
    """How often each item occurs in training, (n_items,) int64, in the order of `tables.items`.
    how="true": each training interaction counts once, targets included. how="windowed": each appearance in the training
    rows' histories counts, so that early interactions count up to max_history times and a last target not at all.
    Deviation: the official code counts "windowed"; our default is "true". Raises ValueError: unknown `how`."""
    if how not in ("true", "windowed"):
        raise ValueError(f"unknown counts {how!r}: choose true or windowed")
    flat, _ = sequences(tables.train) if how == "true" else histories(tables.train)
    return np.bincount(pd.Index(tables.items.item_id).get_indexer(flat), minlength=len(tables.items))
