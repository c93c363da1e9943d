"""Users' files, read and cleaned: RecBole, MovieLens and Amazon 2018 into a table of items and one of interactions."""

from __future__ import annotations

import gzip
import html
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

INTERACTION = ["user_id", "item_id", "timestamp"]
Dataset = tuple[pd.DataFrame, pd.DataFrame]  # items (item_id, title), interactions (user_id, item_id, timestamp)

_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);")
_TAG = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[a-zA-Z][^<>]*>", re.DOTALL | re.IGNORECASE)
_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_ARTICLE = re.compile(r"(.+), (The|An|A)")
_YEAR = re.compile(r"(.+?)\s*\((\d{4})(?:[-–]\d{0,4})?\)(?:\s*\((?:V|TV)\))?")
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}


def clean_title(title: str) -> str:
    """The title in Unicode NFC, HTML entities resolved, tags removed, white space and control characters one space.

    Other characters stay as they are, in any script. Cleaning a clean title changes nothing.
    """
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
    return all(unicodedata.category(c) in _INVISIBLE for c in title)


def _movie_titles(titles: pd.Series, years: pd.Series) -> pd.Series:
    """Titles without their year and with the article in front; films of equal title get their year if it differs."""
    found = [_YEAR.fullmatch(title) for title in titles]
    years = [y if re.fullmatch(r"\d{4}", y) else m[2] if m else None for y, m in zip(years, found)]
    titles = pd.Series([move_article(m[1] if m else t) for t, m in zip(titles, found)], titles.index, dtype=str)
    years = pd.Series(years, titles.index, dtype=str)
    remade = years.notna() & (years.groupby(titles).transform("nunique") > 1)
    return titles.where(~remade, titles + " (" + years + ")")


def read_recbole(folder: str | Path) -> Dataset:
    """RecBole's atomic files: one .inter (user_id, item_id, timestamp) and one .item (item_id and a title column).

    Films (a column `movie_title`, and `release_year` where it is there) get the MovieLens cleaning, see
    `read_movielens`; other titles only `clean_title`.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a malformed line, a missing column, an unknown item.
    """
    inter, item = _one(folder, "*.inter"), _one(folder, "*.item")
    items = _read_table(item, "\t")
    title = next((c for c in ("movie_title", "title", "item_title", "name") if c in items), None)
    if title is None:
        raise ValueError(f"{item} has no title column: name one movie_title:token_seq or title:token_seq")
    items = items.drop(columns="title", errors="ignore") if title != "title" else items
    items = items.rename(columns={title: "title", "release_year": "year"})
    return _dataset(items, _read_table(inter, "\t"), item, inter, films=title == "movie_title")


def read_movielens(folder: str | Path, films: bool = True) -> Dataset:
    """GroupLens' files: u.data and u.item, ratings.dat and movies.dat, or ratings.csv and movies.csv.

    Every rating is an interaction, whatever its value. Titles of films: the year in parentheses is taken off and put back
    only where films of equal title differ in it; `, The` and the like move to the front; the film called unknown
    is dropped with its ratings. Other titles are only cleaned. Timestamps are those of rating sessions, many equal.

    Raises:
        FileNotFoundError: none of the pairs is there. ValueError: a malformed line, an unknown or nameless film.
    """
    folder = Path(folder)
    if (folder / "u.data").is_file():
        paths = folder / "u.item", folder / "u.data"
        items = _read_table(paths[0], "|", ["item_id", "title", *map(str, range(22))], latin1=True)
        ratings = _read_table(paths[1], "\t", ["user_id", "item_id", "rating", "timestamp"])
    elif (folder / "ratings.dat").is_file():
        paths = folder / "movies.dat", folder / "ratings.dat"
        items = _read_table(paths[0], "::", ["item_id", "title", "genres"], latin1=True)
        ratings = _read_table(paths[1], "::", ["user_id", "item_id", "rating", "timestamp"])
    elif (folder / "ratings.csv").is_file():
        paths = folder / "movies.csv", folder / "ratings.csv"
        names = {"userId": "user_id", "movieId": "item_id"}
        items, ratings = (_read_table(path, ",") for path in paths)
        for path, table, needed in ((paths[0], items, {"movieId"}), (paths[1], ratings, {"movieId", "userId"})):
            for own in sorted(needed - set(table)):
                raise ValueError(f"{path} has no column {own}: it has {', '.join(table.columns)}")
        items, ratings = items.rename(columns=names), ratings.rename(columns=names)
    else:
        raise FileNotFoundError(f"{folder} holds none of u.data, ratings.dat and ratings.csv")
    return _dataset(items, ratings, *paths, films)


def read_amazon(reviews: str | Path, metadata: str | Path, since: str = "", until: str = "") -> Dataset:
    """Amazon's 2018 dumps: JSON lines, gzipped or plain, read as a stream.

    Every review is an interaction; `since` (inclusive) and `until` (exclusive) are ISO dates, UTC. Items nobody
    reviewed are left out, and items without a title are dropped with their reviews, both numbers printed.

    Deviation: the paper searches for a time window that leaves enough items; here the window is given by hand.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a line that is no JSON object or lacks a field.
    """
    first, last = (pd.Timestamp(day, tz="UTC").timestamp() if day else None for day in (since, until))
    rows, titles = [], {}
    for where, review in _json_lines(reviews):
        user, asin, when = (review.get(key) for key in ("reviewerID", "asin", "unixReviewTime"))
        if not (isinstance(user, str) and isinstance(asin, str) and type(when) is int):
            raise ValueError(f"{where}: a review needs reviewerID and asin (text) and unixReviewTime (a whole number)")
        if (first is None or when >= first) and (last is None or when < last):
            rows.append((user, asin, when))
    interactions = pd.DataFrame(rows, columns=INTERACTION)
    interactions = interactions.astype({"user_id": str, "item_id": str, "timestamp": np.int64})
    reviewed = set(interactions.item_id)
    for where, product in _json_lines(metadata):
        if not isinstance(product.get("asin"), str):
            raise ValueError(f"{where}: a product needs asin (text)")
        asin, title = product["asin"], product.get("title")
        if asin in reviewed and isinstance(title, str) and not titles.get(asin):  # the dump repeats products
            title = clean_title(title)
            titles[asin] = "" if is_blank(title) else title
    titles = {asin: title for asin, title in titles.items() if title}
    items = pd.DataFrame({"item_id": list(titles), "title": list(titles.values())}, dtype=str)
    known = interactions.item_id.isin(items.item_id)
    if not known.all():
        print(f"dropped {len(reviewed) - len(items)} items without a title and their {(~known).sum()} reviews")
    return items, interactions[known].reset_index(drop=True)


def read_counts(path: str | Path) -> pd.Series:
    """A table title → count from a CSV, JSON or Parquet file, counts above 0, most frequent first, equal titles added up.

    A table has columns title and count, or two columns in that order; a JSON file holds such records or one object
    {title: count}.

    Raises:
        FileNotFoundError: no such file. ValueError: another ending, no such columns, a blank title, a count that is
            not a positive number, or fewer than two titles.
    """
    path = Path(path)
    table = _read_any(path)
    if {"title", "count"} <= set(table):
        table = table[["title", "count"]]
    if table.shape[1] != 2:
        raise ValueError(f"{path.name} needs the columns title and count, and has {', '.join(map(str, table)) or 'none'}")
    table.columns = ["title", "count"]
    numbers = pd.to_numeric(table["count"], errors="coerce")
    titles = table.title.fillna("").astype(str).map(clean_title)
    refuse(titles.map(is_blank), f"{path.name}, {table.index.name}", "the title is blank")
    refuse(~(np.isfinite(numbers) & (numbers > 0)), f"{path.name}, {table.index.name}",
           "the count {} is no positive number, leave a title without any out", table["count"])
    counts = numbers.astype(float).groupby(titles.to_numpy(), sort=False).sum()
    if len(counts) < 2:
        raise ValueError(f"{path.name} has {len(counts)} title: a distribution needs two or more")
    return counts.sort_values(ascending=False, kind="stable")


def read_recommendations(path: str | Path) -> pd.Series:
    """What a recommender recommended, from a CSV, JSON or Parquet file: one title or id a row, a row for every slot.

    The column is `title`, else `item_id`, else the only one there is; other columns (user, rank) are not looked at.

    Raises:
        FileNotFoundError: no such file. ValueError: another ending, no such column, no row, or a blank cell.
    """
    path = Path(path)
    table = _read_any(path)
    named = [name for name in ("title", "item_id") if name in table] or list(table) * (table.shape[1] == 1)
    if not named or not len(table):
        raise ValueError(f"{path.name} needs rows and a column title or item_id, and has {len(table)} rows of "
                         f"{', '.join(map(str, table)) or 'nothing'}")
    names = table[named[0]].fillna("").astype(str).map(clean_title)
    refuse(names.map(is_blank), f"{path.name}, {table.index.name}", f"the {named[0]} is blank")
    return names.rename("title").reset_index(drop=True)


def _read_any(path: Path) -> pd.DataFrame:
    """The table in a CSV, JSON (records, or one object) or Parquet file, indexed by a CSV's lines or by rows from 0."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: a relative path counts from the project's root")
    ending = path.suffix.lower()
    try:
        if ending == ".json":
            held = json.loads(path.read_text(encoding="utf-8"))
            return pd.DataFrame(held.items() if isinstance(held, dict) else held).rename_axis("row")
        if ending == ".csv":
            table = pd.read_csv(path, keep_default_na=False)
            return table.set_axis(pd.RangeIndex(2, 2 + len(table), name="line"))
        if ending == ".parquet":
            return pd.read_parquet(path).reset_index(drop=True).rename_axis("row")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None
    raise ValueError(f"{path.name}: a table ends in .csv, .json or .parquet")


def _one(folder: str | Path, pattern: str) -> Path:
    found = sorted(Path(folder).glob(pattern))
    if len(found) != 1:
        error = ValueError if found else FileNotFoundError
        raise error(f"{folder} holds {len(found)} files {pattern}: exactly one is needed")
    return found[0]


def _read_table(path: Path, sep: str, names: list[str] | None = None, latin1: bool = False) -> pd.DataFrame:
    """The file's cells as strings, indexed by line number; without `names` the first line names the columns."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it belongs beside the other file of the pair")
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        if not latin1:
            line = raw.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{path}, line {line}: not UTF-8, save the file as UTF-8") from None
        raw = raw.decode("latin-1").encode()
    if len(sep) > 1:
        raw, sep = raw.replace(sep.encode(), b"\t"), "\t"
    header = names is None
    if header:
        names = [cell.strip().split(":")[0] for cell in raw.split(b"\n", 1)[0].decode().split(sep)]
    if not raw or raw.count(b"\n") < header:
        raise ValueError(f"{path} has no rows")
    bad = []

    def malformed(row: Any) -> str:
        bad.append(row)
        return "error"

    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(raw),
            pyarrow.csv.ReadOptions(use_threads=False, column_names=names, skip_rows=int(header)),
            pyarrow.csv.ParseOptions(delimiter=sep, quote_char='"' if sep == "," else False,
                                     ignore_empty_lines=False, invalid_row_handler=malformed),
            pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names}),
        )
    except pa.ArrowInvalid as error:
        if not bad:
            raise ValueError(f"{path} cannot be read: {error}") from None
        row = bad[0]
        raise ValueError(
            f"{path}, line {row.number}: {row.actual_columns} fields instead of {row.expected_columns}"
        ) from None
    return table.to_pandas().astype(str).set_axis(np.arange(len(table)) + 1 + header)


def _json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    path, number = Path(path), 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError
                yield f"{path}, line {number}", value
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged after line {number}: download it again") from None
    except ValueError:
        raise ValueError(f"{path}, line {number}: not a JSON object (the 2018 dumps have one a line)") from None


def _dataset(items: pd.DataFrame, interactions: pd.DataFrame, item: Path, inter: Path, films: bool) -> Dataset:
    """Checked and cleaned (items, interactions) from cells as strings, indexed by line number."""
    for path, table, names in ((item, items, ["item_id", "title"]), (inter, interactions, INTERACTION)):
        for name in names:
            if list(table.columns).count(name) > 1:
                raise ValueError(f"{path} has two columns {name}: rename one")
            if name not in table:
                raise ValueError(f"{path} has no column {name}: it has {', '.join(table.columns)}")
            if name != "title":
                refuse(table[name].str.strip() == "", f"{path}, line", f"the {name} is empty")
    at = f"{item}, line"
    refuse(items.item_id.duplicated(), at, "item_id {} stands there twice", items.item_id)
    titles = items.title.map(clean_title)
    refuse(titles.map(is_blank).astype(bool), at, "the title of item {} is blank, give it one", items.item_id)
    interactions, at = interactions[INTERACTION].copy(), f"{inter}, line"
    refuse(~interactions.item_id.isin(items.item_id), at, f"item {{}} is not in {item.name}", interactions.item_id)
    times = pd.to_numeric(interactions.timestamp, errors="coerce")
    refuse(~(times.abs() < 2**62), at, "timestamp {} is no number of seconds", interactions.timestamp)
    interactions["timestamp"] = times.astype(np.int64)
    if films:
        nameless = titles.str.casefold().isin(("unknown", "unkonwn"))
        titles = _movie_titles(titles, items.year if "year" in items else pd.Series("", items.index, dtype=str))
        for name in items.item_id[nameless]:
            rated = interactions.item_id == name
            print(f"dropped item {name}, of unknown title, and its {rated.sum()} ratings")
            items, interactions = items[items.item_id != name], interactions[~rated]
    items = pd.DataFrame({"item_id": items.item_id, "title": titles[items.index]}).reset_index(drop=True)
    interactions = interactions.reset_index(drop=True)
    whole = r"0|[1-9]\d{0,17}"
    if items.item_id.str.fullmatch(whole).all():
        items["item_id"], interactions["item_id"] = items.item_id.astype(int), interactions.item_id.astype(int)
    if interactions.user_id.str.fullmatch(whole).all():
        interactions["user_id"] = interactions.user_id.astype(int)
    return items, interactions


def refuse(wrong: pd.Series, where: str, message: str, values: pd.Series | None = None) -> None:
    """Raises for the first index (a line or a row) that is wrong."""
    if wrong.any():
        i = wrong.idxmax()
        raise ValueError(f"{where} {i}: {message.format(None if values is None else repr(values[[i]].tolist()[0]))}")
