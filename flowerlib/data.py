"""From a user's files to the processed tables: read, clean, filter, split, write, read back.

The processed schema, one Parquet file per table:

| file | columns |
|---|---|
| items.parquet | item_id (integer or string, unique), title (string, not blank) |
| train.parquet, valid.parquet, test.parquet | history (list of item_id, oldest first, not empty), target (item_id) \
and, where known, user_id and timestamp (seconds) |

Equal titles under several item ids are kept: they share a leaf of the trie and are merged there.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import assets, runs
from .readers import Dataset, is_blank, read_amazon, read_movielens, read_recbole, refuse

PARTS = ("train", "valid", "test")
SPLITS = ("leave-one-out", "time")


@dataclass(frozen=True)
class Tables:
    """The processed tables (schema above). `history` is an Arrow list column: iterating over it yields lists."""

    items: pd.DataFrame
    train: pd.DataFrame
    valid: pd.DataFrame
    test: pd.DataFrame


def k_core(interactions: pd.DataFrame, k: int) -> pd.DataFrame:
    """The largest part in which every user and every item has at least k interactions."""
    while True:
        keep = np.ones(len(interactions), dtype=bool)
        for column in ("user_id", "item_id"):
            codes, unique = pd.factorize(interactions[column])
            keep &= np.bincount(codes, minlength=len(unique))[codes] >= k
        if keep.all():
            return interactions.reset_index(drop=True)
        interactions = interactions[keep]


def split_interactions(items: pd.DataFrame, interactions: pd.DataFrame, how: str, max_history: int) -> Tables:
    """Rows of (history, target, user_id, timestamp), one for every interaction with a predecessor, in three parts.

    A user's interactions are sorted by time, in the file's order where times are equal (MovieLens stamps rating
    sessions: half of its steps are ties). The history is the last `max_history` item ids before the target. Rows
    are ordered by user, in order of appearance, then by time.

    how="leave-one-out": a user's last interaction is test, the last but one validation, the rest training; users
    with fewer than three interactions are training only. how="time": the rows sorted by time over all users, the
    first 8/10 training, 1/10 validation, 1/10 test (the paper's split).

    Raises:
        ValueError: unknown `how`, or max_history below 1.
    """
    if how not in SPLITS:
        raise ValueError(f"unknown split {how!r}: choose one of {', '.join(SPLITS)}")
    if max_history < 1:
        raise ValueError(f"max_history is {max_history}: a history needs at least one item")
    user = pd.factorize(interactions.user_id)[0]
    order = np.lexsort((interactions.timestamp.to_numpy(), user))
    rows, user = interactions.iloc[order].reset_index(drop=True), user[order]
    sizes = np.bincount(user)
    size, position = np.repeat(sizes, sizes), _within(sizes)
    part = np.zeros(len(rows), dtype=int)
    if how == "leave-one-out":
        part[(size >= 3) & (position == size - 2)] = 1
        part[(size >= 3) & (position == size - 1)] = 2
    else:
        targets = np.flatnonzero(position > 0)
        ranked = targets[np.argsort(rows.timestamp.to_numpy()[targets], kind="stable")]
        n = len(ranked)
        part[ranked[n * 8 // 10 : n * 9 // 10]] = 1
        part[ranked[n * 9 // 10 :]] = 2
    ids = pa.array(rows.item_id)

    def table(which: int) -> pd.DataFrame:
        index = np.flatnonzero((part == which) & (position > 0))
        lengths = np.minimum(position[index], max_history)
        history = ids.take(pa.array(np.repeat(index - lengths, lengths) + _within(lengths)))
        columns = {"history": _list_column(history, lengths), "target": rows.item_id.to_numpy()[index]}
        return pd.DataFrame(columns | {name: rows[name].array[index] for name in ("user_id", "timestamp")})

    return Tables(items.reset_index(drop=True), *map(table, range(3)))


def _within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … within each group of the given lengths, the groups one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _list_column(flat: pa.Array | pa.ChunkedArray, lengths: np.ndarray) -> pd.Series:
    flat = flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
    offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int64())
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.LargeListArray.from_arrays(offsets, flat)))


def load(settings: runs.Settings) -> Tables:
    """The tables of the settings' data: MovieLens-100K if `data_path` is "", otherwise what that folder holds.

    Understood are processed tables (items.parquet …), RecBole (*.inter, *.item), MovieLens (see `read_movielens`)
    and Amazon's 2018 dumps (meta_*.json[.gz] and one other *.json[.gz], brought to their 5-core). `max_items` keeps
    the most interacted items and then `max_users` the first users, before the split. Of processed tables, which are
    split already, `split`, `max_items` and `max_users` change nothing but a printed line; histories are cut to
    `max_history`.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that is understood.
        ValueError: malformed data, or a part of the split is empty.
    """
    if not settings.data_path and settings.dataset != "movielens-100k":
        raise ValueError(f"dataset {settings.dataset!r} isn't fetched: put it into a folder and name it in data_path")
    folder = runs.ROOT / Path(settings.data_path).expanduser() if settings.data_path else assets.movielens_100k()
    if (folder / "items.parquet").is_file():
        tables = _cut_histories(read_processed(folder), settings.max_history)
        if settings.max_items or settings.max_users:
            print(f"{folder.name} is split already: max_items and max_users are not applied")
    else:
        items, interactions = _slice(*_read(folder, films=settings.category == "movie"), settings.max_items, settings.max_users)
        tables = split_interactions(items, interactions, settings.split, settings.max_history)
    for part in PARTS:
        if not len(getattr(tables, part)):
            raise ValueError(f"{folder} leaves no row for {part}: bring more interactions or another split")
    return tables


def _read(folder: Path, films: bool) -> Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: data_path counts from the project's root")
    if any(folder.glob("*.inter")):
        return read_recbole(folder)
    if any((folder / name).is_file() for name in ("u.data", "ratings.dat", "ratings.csv")):
        return read_movielens(folder, films)
    dumps = {path for ending in ("json", "json.gz", "jsonl", "jsonl.gz") for path in folder.glob(f"*.{ending}")}
    meta = {path for path in dumps if path.name.startswith("meta_")}
    if len(meta) == 1 and len(dumps) == 2:
        items, interactions = read_amazon((dumps - meta).pop(), meta.pop())
        interactions = k_core(interactions, 5)
        return items[items.item_id.isin(interactions.item_id)].reset_index(drop=True), interactions
    raise FileNotFoundError(
        f"{folder} holds no data that is understood: looked for items.parquet, *.inter with *.item, u.data, "
        "ratings.dat, ratings.csv, and one meta_*.json[.gz] with one other *.json[.gz]"
    )


def _slice(items: pd.DataFrame, interactions: pd.DataFrame, max_items: int, max_users: int) -> Dataset:
    n_items, n_users = len(items), interactions.user_id.nunique()
    if max_items:
        counts = interactions.item_id.value_counts().reindex(items.item_id, fill_value=0).to_numpy()
        items = items.iloc[np.sort(np.argsort(-counts, kind="stable")[:max_items])].reset_index(drop=True)
        interactions = interactions[interactions.item_id.isin(items.item_id)]
    if max_users:
        interactions = interactions[interactions.user_id.isin(interactions.user_id.unique()[:max_users])]
    if max_items or max_users:
        print(
            f"kept {len(items):,} of {n_items:,} items (max_items) and {interactions.user_id.nunique():,} of "
            f"{n_users:,} users (max_users); 0 keeps all"
        )
    return items, interactions.reset_index(drop=True)


def _cut_histories(tables: Tables, max_history: int) -> Tables:
    def cut(rows: pd.DataFrame) -> pd.DataFrame:
        flat, offsets = histories(rows)
        lengths = np.minimum(np.diff(offsets), max_history)
        kept = flat[np.repeat(offsets[1:] - lengths, lengths) + _within(lengths)]
        return rows.assign(history=_list_column(pa.array(kept), lengths))

    return Tables(tables.items, *(cut(getattr(tables, part)) for part in PARTS))


def write_processed(tables: Tables, folder: str | Path) -> None:
    """Writes the four Parquet files; they replace older ones together, after all are written."""
    with ExitStack() as stack:
        for name in ("items", *PARTS):
            new = stack.enter_context(runs.atomic(Path(folder) / f"{name}.parquet"))
            table = pa.Table.from_pandas(getattr(tables, name), preserve_index=False)
            pq.write_table(table.replace_schema_metadata(), new)  # pandas cannot read its own notes on list columns


def read_processed(folder: str | Path) -> Tables:
    """The tables that `write_processed`, or anybody else, wrote in the schema above. Titles stay as they are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or lacks a column; an item_id stands twice; a title is blank or holds a line
            break; a history is empty; a row names an item that is not in items.parquet. Rows count from 0.
    """
    folder = Path(folder)
    path = folder / "items.parquet"
    items, at = _read_parquet(path, ("item_id", "title"))[["item_id", "title"]], f"{path}, row"
    for name in items:
        refuse(items[name].isna(), at, f"the {name} is missing")
    items["title"] = items.title.astype(str)
    refuse(items.item_id.duplicated(), at, "item_id {} stands there twice", items.item_id)
    refuse(items.title.map(is_blank).astype(bool), at, "the title of item {} is blank", items.item_id)
    broken = items.title.str.contains(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
    refuse(broken, at, "the title of item {} holds a control character, use clean_title", items.item_id)
    return Tables(items, *(_read_rows(folder / f"{part}.parquet", items) for part in PARTS))


def _read_rows(path: Path, items: pd.DataFrame) -> pd.DataFrame:
    rows, at = _read_parquet(path, ("history", "target")), f"{path}, row"
    rows = rows[[name for name in ("history", "target", "user_id", "timestamp") if name in rows]]
    if not isinstance(rows.history.dtype, pd.ArrowDtype):
        raise ValueError(f"{path}: history is no list of item ids but {rows.history.dtype}")
    flat, offsets = histories(rows)
    lengths = np.diff(offsets)
    refuse(pd.Series(lengths == 0), at, "the history is empty")
    known = pd.Index(items.item_id)
    unknown = np.flatnonzero(known.get_indexer(flat) < 0)
    if len(unknown):
        row = np.searchsorted(offsets, unknown[0], side="right") - 1
        raise ValueError(f"{at} {row}: item {flat.tolist()[unknown[0]]!r} of the history is not in items.parquet")
    refuse(pd.Series(known.get_indexer(rows.target) < 0), at, "target {} is not in items.parquet", rows.target)
    return rows


def _read_parquet(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the processed tables are items, train, valid and test.parquet")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or no Parquet file: write it anew ({error})") from None
    for name in needed:
        if name not in table.column_names:
            raise ValueError(f"{path} has no column {name}: it has {', '.join(table.column_names)}")
    lists = {field.name: field.type for field in table.schema if pa.types.is_nested(field.type)}
    frame = table.drop_columns(list(lists)).replace_schema_metadata().to_pandas()
    for name, kind in lists.items():
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            frame[name] = pd.Series(pd.arrays.ArrowExtensionArray(table[name].cast(pa.large_list(kind.value_type))))
    return frame


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
    """For each row of a part, positions in `tables.items` of all that its user had chosen before the target.

    That is more than the history, which ends after max_history titles, where the rows name their user.
    """
    before: dict[Any, dict[int, None]] = {}  # what each user has chosen so far, in order
    for name in PARTS[: PARTS.index(part) + 1]:
        rows, result = getattr(tables, name), []
        users = rows.user_id if "user_id" in rows else range(len(rows))
        for user, history, target in zip(users, *row_positions(tables, rows), strict=True):
            chosen = before.setdefault(user if "user_id" in rows else (name, user), {})
            chosen.update(dict.fromkeys(history))
            result.append(list(chosen) if name == part else [])
            chosen[target] = None
    return result


def sequences(train: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The users' training sequences put together from their rows: (n,) item ids and (m+1,) offsets.

    A row continues the earliest earlier row, not continued yet, whose history + target ends in its history (of the
    same user where user_id is there; histories are capped at the longest). Users' rows may be mixed, but each
    user's must stand in the order of time. Each training interaction appears once, but for those in no row at all.
    """
    flat, offsets = histories(train)
    n, target = len(train), train.target.to_numpy()
    codes = pd.factorize(np.r_[flat, target])[0].astype(np.int32)
    past, next_ = codes[: len(flat)].tobytes(), codes[len(flat) :].tobytes()
    user = pd.factorize(train.user_id)[0].tolist() if "user_id" in train else [0] * n
    ends = (4 * offsets).tolist()  # in bytes, as are the slices below
    cap = 4 * int(np.diff(offsets).max(initial=0))
    sequence, position, heads = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64), []
    waiting: dict[tuple[int, bytes], list[int]] = {}  # (user, end of a sequence) -> the rows it ends with
    for k in range(n):
        history = past[ends[k] : ends[k + 1]]
        before = waiting.get((user[k], history))
        if before:
            last = before.pop(0)
            sequence[k], position[k] = sequence[last], position[last] + 1
            if not before:
                del waiting[user[k], history]
        else:
            sequence[k], position[k] = len(heads), len(history) // 4
            heads.append(k)
        waiting.setdefault((user[k], (history + next_[4 * k : 4 * k + 4])[-cap:]), []).append(k)
    lengths = np.diff(offsets)[heads]
    starts = np.r_[0, np.cumsum(lengths + np.bincount(sequence, minlength=len(heads)))].astype(np.int64)
    out = np.empty(starts[-1], dtype=flat.dtype)
    inside = _within(lengths)
    out[np.repeat(starts[:-1], lengths) + inside] = flat[np.repeat(offsets[heads], lengths) + inside]
    out[starts[sequence] + position] = target
    return out, starts


def item_leaves(items: pd.DataFrame) -> np.ndarray:
    """(n_items,) leaf id of each item: equal titles share one, numbered by their first item, as in the title tree."""
    return pd.factorize(items.title)[0]


def item_counts(tables: Tables, how: str = "true") -> np.ndarray:
    """How often each item occurs in training, (n_items,) int64, in the order of `tables.items`.

    how="true": each training interaction once, targets included. how="windowed": every appearance in the training
    rows' histories, so that early interactions count up to max_history times and a last target not at all.

    Deviation: the official code counts "windowed"; our default is "true".

    Raises:
        ValueError: unknown `how`.
    """
    if how not in ("true", "windowed"):
        raise ValueError(f"unknown counts {how!r}: choose true or windowed")
    flat, _ = sequences(tables.train) if how == "true" else histories(tables.train)
    return np.bincount(pd.Index(tables.items.item_id).get_indexer(flat), minlength=len(tables.items))
