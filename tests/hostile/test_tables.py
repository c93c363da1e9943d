"""Tables that users bring: each is read right or refused in one sentence that names the file; hostile titles in trees.

A table of cases; then files of random and of damaged bytes, read again by naive loops; then random catalogues.
FLOWERLIB_HARD=1 tries more of them, 3,000 damaged tables and 10,000 catalogues, and prints how many were tried.
"""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flowerlib import data, metrics
from flowerlib.lab import sources, training
from flowerlib.lab.settings import settings
from flowerlib.model import Catalogue, prompt_texts, tiny_model
from flowerlib.tree import Beams, beam_search

HARD = bool(os.environ.get("FLOWERLIB_HARD"))
DAMAGED, RANDOM, CATALOGUES = (200, 100, 10_000) if HARD else (30, 15, 40)  # of each format; of all
BOM = "\ufeff"
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "x" * 3_000_000
READERS = {
    "counts": lambda folder: sources.read_counts(only(folder)),
    "lists": lambda folder: sources.read_recommendations(only(folder)),
    "recbole": sources.read_recbole,
    "movielens": sources.read_movielens,
    "amazon": lambda folder: sources.read_amazon(*(next(folder.glob(f"{name}*")) for name in ("r.", "meta_r."))),
    "processed": sources.read_processed,
}


def only(folder):
    (path,) = folder.iterdir()
    return path


def write(folder, files):
    """Text as UTF-8, bytes as they are, dictionaries of columns as Parquet, None as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.mkdir()
        elif isinstance(content, dict):
            pq.write_table(pa.table(list(content.values()), names=list(content)), path)
        elif isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(reader, folder):
    """What the reader returns, as plain lists; or its message, if it is one sentence that names a file."""
    try:
        result = READERS[reader](folder)
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), repr(error)  # no UnicodeDecodeError, no JSONDecodeError
        message = str(error)
        assert message.startswith(str(folder)), message
        assert len(message) < len(str(folder)) + 400 and "\n" not in message, message
        return message.removeprefix(str(folder)).removeprefix("/")
    if reader == "counts":
        assert (result.diff().dropna() <= 0).all()
        return result.to_dict()
    if reader == "lists":
        return result.tolist()
    if reader == "processed":
        columns = [result.items.item_id.tolist(), result.items.title.tolist()]
        for part in data.PARTS:
            rows = getattr(result, part)
            columns += [[list(history) for history in rows.history], rows.target.tolist()]
            columns += [rows.user_id.tolist()] if "user_id" in rows else []
        return columns
    items, interactions = result
    return list(zip(items.item_id, items.title)), list(map(tuple, interactions.to_numpy().tolist()))


# --- cases ---

INTER, ITEM = "user_id:token\titem_id:token\ttimestamp:float\n", "item_id:token\ttitle:token_seq\n"
RECBOLE = {"a.item": ITEM + "10\tToy\n20\tHeat\n", "a.inter": INTER + "1\t10\t5\n2\t20\t6\n"}
READ = [(10, "Toy"), (20, "Heat")], [(1, 10, 5), (2, 20, 6)]
CSVS = {"movies.csv": "movieId,title,genres\n10,Toy,x\n20,Heat,x\n",
        "ratings.csv": "userId,movieId,rating,timestamp\n1,10,3,5\n2,20,3,6\n"}
U_ITEM = "".join(f"{i}|{title}|{'|'.join('0' * 22)}\n" for i, title in ((10, "Toy"), (20, "Café")))
REVIEW = '{"reviewerID": "u", "asin": "A", "unixReviewTime": 5}\n'
AMAZON = {"r.json": REVIEW, "meta_r.json": '{"asin": "A", "title": "Toy"}\n'}
BOUGHT = [("A", "Toy")], [("u", "A", 5)]
PART = {"history": [[10], [10, 20]], "target": [20, 30], "user_id": [1, 2]}
PROCESSED = {"items.parquet": {"item_id": [10, 20, 30], "title": ["a", "b", "b"]}} | {
    f"{part}.parquet": PART for part in data.PARTS}
TITLES = ["Heat", "Fargo"]
COUNTS = {"Fargo": 4.0, "Heat": 3.0}
DAY = datetime.datetime(2020, 1, 1)
NO_HEADER = "names no column, begin with a line such as title,count"


def counted(**columns):
    return {"c.parquet": {"title": TITLES, "count": [3, 4]} | columns}


def changed(files, **changes):
    return files | {name.replace("__", "."): content for name, content in changes.items()}


CASES = {
    # CSV
    "unquoted commas": ("counts", {"c.csv": "title,count\nA, x,30\nA, y,20\n"},
                        "c.csv, line 2: 3 fields instead of 2, write one for each column, quote a cell that holds a c"),
    "unquoted commas in lists": ("lists", {"c.csv": "user,title\n1,A, x\n1,A, y\n"}, "c.csv, line 2: 3 fields"),
    "unquoted commas in movies": ("movielens", changed(CSVS, movies__csv="movieId,title,genres\n10,A, x,y\n"),
                                  "movies.csv, line 2: 4 fields instead of 3"),
    "no header": ("counts", {"c.csv": "Heat,1000\nFargo,100\nAlien,10\n"}, f"c.csv, line 1: '1000' {NO_HEADER}"),
    "no header, a number of digits": ("counts", {"c.csv": "Heat,1e3\nFargo,100\nAlien,10\n"}, "line 1: '1e3' names no"),
    "no header, ids": ("counts", {"c.csv": "7,3\n8,4\n9,5\n"}, "line 1: '7' names no column"),
    "no header, lists": ("lists", {"c.csv": "Heat\nFargo\nHeat\n"}, "c.csv needs rows and a column title or item_id, and has 2 rows of Heat"),
    "no header, every title once": ("lists", {"c.csv": "Heat\nFargo\n"}, "c.csv needs rows and a column title or item_id"),
    "no header, lists of ids": ("lists", {"c.csv": "17\n18\n"}, "c.csv, line 1: '17' names no column"),
    "no header, users and titles": ("lists", {"c.csv": "1,Heat\n2,Fargo\n"}, "c.csv, line 1: '1' names no column"),
    "no header, movies": ("movielens", changed(CSVS, movies__csv="10,Toy,x\n20,Heat,x\n"),
                          "movies.csv has no column movieId: it has 10, Toy, x, in line 1"),
    "no header, ratings": ("movielens", changed(CSVS, ratings__csv="1,10,3,5\n2,10,3,5\n"), "ratings.csv has no colum"),
    "no header, RecBole": ("recbole", changed(RECBOLE, a__item="10\tToy\n20\tHeat\n"), "a.item has no column item_id"),
    "a number names another column": ("lists", {"c.csv": "title,1\nHeat,2\n"}, ["Heat"]),
    "semicolons": ("counts", {"c.csv": "title;count\nHeat;3\nFargo;4\n"}, "line 1: 'title;count' names no column"),
    "semicolons in lists": ("lists", {"c.csv": "title;rank\nHeat;1\n"}, "line 1: 'title;rank' names no column"),
    "tabs": ("counts", {"c.csv": "title\tcount\nHeat\t3\n"}, "line 1: 'title\\tcount' names no column"),
    "BOM": ("counts", {"c.csv": BOM + "title,count\nHeat,3\nFargo,4\n"}, COUNTS),
    "BOM, quoted": ("counts", {"c.csv": BOM + '"title",count\nHeat,3\nFargo,4\n'}, COUNTS),
    "zeros": ("counts", {"c.csv": "item_id,count\n007,3\n7,4\n"}, {"7": 4.0, "007": 3.0}),
    "zeros in lists": ("lists", {"c.csv": "item_id\n007\n7\n"}, ["007", "7"]),
    "zeros in RecBole": ("recbole", {"a.item": ITEM + "7\tToy\n007\tHeat\n", "a.inter": INTER + "01\t007\t5\n1\t7\t6"},
                         ([("7", "Toy"), ("007", "Heat")], [("01", "007", 5), ("1", "7", 6)])),
    "other digits": ("recbole", {"a.item": ITEM + "13\tToy\n1٣\tHeat\n", "a.inter": INTER + "1\t13\t5\n1\t1٣\t6\n"},
                     ([("13", "Toy"), ("1٣", "Heat")], [(1, "13", 5), (1, "1٣", 6)])),
    "count before title": ("counts", {"c.csv": "count,item_id\n3,70\n4,80\n"}, {"80": 4.0, "70": 3.0}),
    "number before title": ("counts", {"c.csv": "n,title\n3,1984\n4,300\n"}, {"300": 4.0, "1984": 3.0}),
    "equal titles add up": ("counts", {"c.csv": "title,count\nHeat,1\nHeat ,2\nFargo,4\n"}, COUNTS),
    "two columns of one name": ("counts", {"c.csv": "title,count,count\nHeat,3,3\n"}, "c.csv has two columns count, r"),
    "two columns title": ("lists", {"c.csv": "title,title\nHeat,x\n"}, "c.csv has two columns title, rename one"),
    "columns without names": ("counts", {"c.csv": ",\nHeat,3\n"}, "c.csv has two columns , rename one"),
    "two release years": ("recbole", changed(RECBOLE, a__item="item_id\tmovie_title\trelease_year\trelease_year\n"
                                             "10\tToy\t1\t2\n20\tHeat\t1\t2\n"), "a.item has two columns release_year"),
    "truth values": ("counts", {"c.csv": "title,count\nHeat,True\n"}, "line 2: the count 'True' is no positive number"),
    "dates": ("counts", {"c.csv": "title,count\nHeat,2020-01-01\n"}, "line 2: the count '2020-01-01' is no positive"),
    "infinite sums": ("counts", {"c.csv": "title,count\nHeat,1e308\nHeat,1e308\nFargo,1\n"}, "line 2: the count '1e30"),
    "NaN": ("counts", {"c.csv": "title,count\nHeat,nan\nFargo,1\n"}, "c.csv, line 2: the count 'nan' is no positive"),
    "invisible": ("counts", {"c.csv": "title,count\nHeat,1\n\u200b\u2060,3\n"}, "line 3: the title is blank (markup does not count), give it"),
    "huge title": ("counts", {"c.csv": f"title,count\nHeat,1\n{HUGE},3\n"}, "line 3: the title has over 10,000 ch"),
    "huge header": ("counts", {"c.csv": HUGE + ",a,b\nHeat,1,2\n"}, "c.csv needs the columns title and count, and has"),
    "huge title in RecBole": ("recbole", changed(RECBOLE, a__item=ITEM + f"10\tToy\n20\t{HUGE}\n"),
                              "a.item, line 3: the title of item '20' has over 10,000 characters"),
    "NUL": ("counts", {"c.csv": "title,count\nHeat,3\nFar\0go,4\n"}, "c.csv, line 3: not UTF-8, save the file as UTF-"),
    "Latin-1": ("counts", {"c.csv": "title,count\nHeat,3\nCafé,4\n".encode("latin-1")}, "c.csv, line 3: not UTF-8, sa"),
    "UTF-16": ("counts", {"c.csv": "title,count\nHeat,3\n".encode("utf-16")}, "c.csv, line 1: not UTF-8"),
    "UTF-16 without BOM": ("counts", {"c.csv": "title,count\nHeat,3\n".encode("utf-16-le")}, "c.csv, line 1: not UTF-"),
    "line ends": ("counts", {"c.csv": "title,count\r\nHeat,3\rFargo,1\nFargo,3\r\n\r\n"}, COUNTS),
    "a quote without end": ("counts", {"c.csv": 'title,count\nHeat,3\n"Fargo,4\n'}, "c.csv, line 3: 1 fields instead"),
    "empty": ("counts", {"c.csv": ""}, "c.csv has no rows"),
    "empty lines": ("lists", {"c.csv": "\n\n\n"}, "c.csv has no rows"),
    "a folder": ("counts", {"c.csv": None}, "c.csv is a folder, not a file: put it there"),
    "Parquet as CSV": ("counts", {"c.csv": b"PAR1\x15\0\xff"}, "c.csv, line 1: not UTF-8"),
    "braces": ("lists", {"c.csv": "{x}\nHeat\n \n"}, "c.csv needs rows and a column title or item_id"),
    "too few titles": ("counts", {"c.csv": "title,count\nHeat,3\n"}, "c.csv has 1 title: a distribution needs two"),
    # RecBole, MovieLens
    "BOM in RecBole": ("recbole", {name: BOM + text for name, text in RECBOLE.items()}, READ),
    "BOM in MovieLens": ("movielens", {name: BOM + text for name, text in CSVS.items()}, READ),
    "BOM without header": ("movielens", {"u.item": BOM + U_ITEM, "u.data": BOM + "1\t10\t3\t5\n2\t20\t3\t6\n"},
                           ([(10, "Toy"), (20, "Café")], READ[1])),
    "Latin-1 MovieLens": ("movielens", {"u.item": U_ITEM.encode("latin-1"), "u.data": "1\t10\t3\t5\n2\t20\t3\t6\n"},
                          ([(10, "Toy"), (20, "Café")], READ[1])),
    "line ends in RecBole": ("recbole", {name: text.replace("\n", "\r", 1) for name, text in RECBOLE.items()}, READ),
    "times of 10^30": ("recbole", changed(RECBOLE, a__inter=INTER + "1\t10\t5\n2\t20\t1" + "0" * 30 + "\n"),
                       "a.inter, line 3: timestamp '100000000000...0000000000000' is no number of seconds"),
    "a year alone": ("movielens", changed(CSVS, movies__csv="movieId,title,genres\n10,\u200b (1999),x\n20,Heat,x\n"),
                     ([(10, "\u200b (1999)"), (20, "Heat")], READ[1])),
    "a folder as RecBole": ("recbole", changed(RECBOLE, a__item=None), "a.item is a folder, not a file"),
    "a blank id": ("recbole", changed(RECBOLE, a__inter=INTER + "1\t10\t5\n \t20\t6\n"), "a.inter, line 3: the user_i"),
    # Amazon
    "Amazon": ("amazon", AMAZON, BOUGHT),
    "Amazon, BOM": ("amazon", {name: BOM + text for name, text in AMAZON.items()}, BOUGHT),
    "Amazon, Latin-1": ("amazon", changed(AMAZON, meta_r__json='{"asin": "A", "title": "Toy"}\n'.encode() * 500
                                          + '{"asin": "B", "title": "Café"}\n'.encode("latin-1")),
                        "meta_r.json, line 501: not UTF-8, save the file as UTF-8"),
    "Amazon, Latin-1, gzipped": ("amazon", {"r.json.gz": gzip.compress(REVIEW.replace("u", "é").encode("latin-1"))}
                                 | {"meta_r.json": ""}, "r.json.gz, line 1: not UTF-8"),
    "Amazon, deep": ("amazon", changed(AMAZON, r__json=REVIEW + DEEP), "r.json, line 2: not a JSON object with review"),
    "Amazon, deep title": ("amazon", changed(AMAZON, meta_r__json='{"asin": "A", "title": ' + DEEP + "}"),
                           "meta_r.json, line 1: not a JSON object with asin"),
    "Amazon, times of 10^30": ("amazon", changed(AMAZON, r__json=REVIEW + REVIEW.replace("5", "1" + "0" * 30)),
                               "r.json, line 2: not a JSON object with reviewerID (str), asin (str), unixReviewTime ("),
    "Amazon, blank user": ("amazon", changed(AMAZON, r__json=REVIEW.replace('"u"', '""')), "r.json, line 1: not a JSO"),
    "Amazon, half a character": ("amazon", changed(AMAZON, r__json=REVIEW.replace('"u"', '"\\ud800"')), "r.json, line"),
    "Amazon, half a character in a title": ("amazon", changed(
        AMAZON, meta_r__json='{"asin": "A", "title": "Toy \\ud83d"}\n'), BOUGHT),
    "Amazon, an empty title": ("amazon", changed(AMAZON, meta_r__json='{"asin": "A", "title": ""}\n'), ([], [])),
    "Amazon, empty": ("amazon", changed(AMAZON, r__json=""), ([], [])),
    "Amazon, no gzip": ("amazon", {"r.json.gz": REVIEW, "meta_r.json": ""}, "r.json.gz is damaged after line 0: downl"),
    "Amazon, cut off": ("amazon", {"r.json.gz": gzip.compress(REVIEW.encode() * 9)[:-9], "meta_r.json": ""},
                        "r.json.gz is damaged after line "),
    "Amazon, a folder": ("amazon", changed(AMAZON, r__json=None), "r.json is a folder, not a file"),
    "Amazon, a huge title": ("amazon", changed(AMAZON, meta_r__json=json.dumps({"asin": "A", "title": HUGE})),
                             ([], [])),
    # JSON
    "JSON": ("counts", {"c.json": '{"Heat": 3, "Fargo": "4"}'}, COUNTS),
    "JSON, BOM": ("counts", {"c.json": BOM + '[{"title": "Heat", "count": 3}, {"count": 4, "title":"Fargo"}]'}, COUNTS),
    "JSON, one name twice": ("counts", {"c.json": '{"Heat": 1, "Heat": 2, "Fargo": 4}'}, COUNTS),
    "JSON, a list": ("lists", {"c.json": '["Heat", "Fargo", 7, "007"]'}, ["Heat", "Fargo", "7", "007"]),
    "JSON, pairs": ("counts", {"c.json": '[["Heat", 3], ["Fargo", 4]]'}, COUNTS),
    "JSON, deep": ("counts", {"c.json": DEEP}, "c.json is damaged, write it anew as a JSON list of records"),
    "JSON, deep objects": ("lists", {"c.json": '{"a":' * 100_000 + "1" + "}" * 100_000}, "c.json is damaged"),
    "JSON, cut off": ("counts", {"c.json": '[{"title": "Heat",\n"count": 3}'}, "c.json, line 2 is damaged, write it a"),
    "JSON lines": ("counts", {"c.json": '{"Heat": 1}\n{"Fargo": 1}\n'}, "c.json, line 2 is damaged"),
    "JSON, text": ("lists", {"c.json": '"Heat"'}, "c.json is damaged"),
    "JSON, nothing": ("counts", {"c.json": "null"}, "c.json needs the columns title and count, and has "),
    "JSON, empty": ("counts", {"c.json": ""}, "c.json, line 1 is damaged"),
    "JSON, truth values": ("counts", {"c.json": '{"Heat": 2, "Fargo": true}'}, "row 1: the count True is no positive"),
    "JSON, a title of truth": ("lists", {"c.json": '[{"title": true}]'}, "row 0: the title True is no text and no integer"),
    "JSON, a broken number": ("lists", {"c.json": '[{"item_id": 7.5}]'}, "row 0: the title 7.5 is no text and no integer"),
    "JSON, no title": ("lists", {"c.json": '[{"title": "Heat"}, {"title": null}]'}, "row 1: the title is missing"),
    "JSON, a list as title": ("counts", {"c.json": '[{"title": ["Heat"], "count": 1}]'}, "row 0: the title ['Heat'] i"),
    "JSON, long numbers": ("counts", {"c.json": '{"Heat": 1' + "0" * 400 + "}"}, "c.json, row 0: the count 1000"),
    "JSON, longer numbers": ("counts", {"c.json": '{"Heat": 1' + "0" * 5000 + "}"}, "c.json is damaged"),
    "JSON, Latin-1": ("counts", {"c.json": '{"Heat": 1,\n"Café": 1}'.encode("latin-1")}, "c.json, line 2: not UTF-8"),
    "JSON, half a character": ("counts", {"c.json": '{"\\ud800": 1, "Heat": 1}'}, "c.json, row 0: the title is blank"),
    "JSON, a folder": ("lists", {"c.json": None}, "c.json is a folder"),
    # Parquet
    "Parquet": ("counts", counted(), COUNTS),
    "dates as counts": ("counts", counted(count=[DAY] * 2), "c.parquet, row 0: the count Timestamp("),
    "durations as counts": ("counts", counted(count=[datetime.timedelta(1)] * 2), "c.parquet, row 0: the count Timede"),
    "truth as counts": ("counts", counted(count=[True, True]), "c.parquet, row 0: the count True is no positive numbe"),
    "bytes as counts": ("counts", counted(count=[b"3", b"4"]), "c.parquet, row 0: the count b'3' is no positive numbe"),
    "lists as counts": ("counts", counted(count=[[3], [4]]), "c.parquet, row 0: the count [3] is no positive number"),
    "structs as counts": ("counts", counted(count=[{"a": 1}] * 2), "c.parquet, row 0: the count {'a': 1} is no positi"),
    "decimals": ("counts", counted(count=[decimal.Decimal("3"), decimal.Decimal("4")]), COUNTS),
    "categories": ("counts", counted(title=pa.array(TITLES).dictionary_encode()), COUNTS),
    "a missing count": ("counts", counted(count=[3, None]), "c.parquet, row 1: the count nan is no positive number"),
    "a missing title": ("counts", counted(title=["Heat", None]), "c.parquet, row 1: the title is missing"),
    "dates as titles": ("lists", counted(title=[DAY] * 2), "c.parquet, row 0: the title Timestamp("),
    "broken numbers as titles": ("lists", counted(title=[7.0, 8.5]), "c.parquet, row 0: the title 7.0 is no text"),
    "lists as titles": ("lists", counted(title=[["a"], ["b"]]), "c.parquet, row 0: the title ['a'] is no text"),
    "bytes as titles": ("lists", counted(title=[b"Heat", b"\xff"]), "c.parquet, row 0: the title b'Heat' is no text"),
    "text that is no UTF-8": ("lists", counted(title=pa.StringArray.from_buffers(
        2, pa.py_buffer(np.int32([0, 1, 2])), pa.py_buffer(b"\xffa"))), "c.parquet is damaged, write it anew"),
    "two columns of titles": ("counts", {"c.parquet": pa.table([TITLES, TITLES, [1, 2]], ["title", "title", "count"])},
                                "c.parquet has two columns title, rename one"),
    "text as Parquet": ("counts", {"c.parquet": "title,count\nHeat,3\n"}, "c.parquet is damaged, write it anew as a P"),
    "empty Parquet": ("counts", {"c.parquet": b""}, "c.parquet is damaged"),
    "no rows": ("lists", {"c.parquet": {"title": pa.array([], pa.string())}}, "c.parquet needs rows and a column titl"),
    "a Parquet folder": ("counts", {"c.parquet": None}, "c.parquet is a folder"),
    # processed tables
    "processed": ("processed", PROCESSED, [[10, 20, 30], ["a", "b", "b"]] + [PART["history"], [20, 30], [1, 2]] * 3),
    "ids that are lists": ("processed", changed(PROCESSED, items__parquet={"item_id": [[1], [2]], "title": TITLES}),
                           "items.parquet, row 0: the item_id [1] is no text and no integer"),
    "ids that are broken numbers": ("processed", changed(PROCESSED, items__parquet={"item_id": [1.5], "title": ["a"]}),
                                      "items.parquet, row 0: the item_id 1.5 is no text"),
    "titles that are structs": ("processed", changed(PROCESSED, items__parquet={"item_id": [1], "title": [{"a": 1}]}),
                                "items.parquet, row 0: the title {'a': 1} is no text"),
    "histories of structs": ("processed", changed(PROCESSED, train__parquet=PART | {"history": [{"a": 1}] * 2}),
                             "train.parquet: history is no list of item ids but struct<"),
    "histories of lists": ("processed", changed(PROCESSED, train__parquet=PART | {"history": [[[10]], [[20]]]}),
                           "train.parquet: history is no list of item ids but list<"),
    "histories of truth": ("processed", changed(PROCESSED, train__parquet=PART | {"history": [[True], [True]]}),
                           "train.parquet: history is no list of item ids but list<"),
    "a missing id in a history": ("processed", changed(PROCESSED, test__parquet=PART | {"history": [[10], [None]]}),
                                  "test.parquet, row 1: item nan of the history is not in items.parquet"),
    "a list as target": ("processed", changed(PROCESSED, test__parquet=PART | {"target": [[20], [30]]}),
                         "test.parquet, row 0: the target [20] is no text and no integer"),
    "a missing user": ("processed", changed(PROCESSED, valid__parquet=PART | {"user_id": [1, None]}),
                       "valid.parquet, row 1: the target or the user_id is missing"),
    "users that are lists": ("processed", changed(PROCESSED, valid__parquet=PART | {"user_id": [[1], [2]]}),
                             "valid.parquet, row 0: the user_id [1] is no text"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_table_is_read_right_or_refused_in_a_sentence(tmp_path, case):
    reader, files, expected = CASES[case]
    got = read(reader, write(tmp_path / "own", files))
    if isinstance(expected, str):
        assert isinstance(got, str) and expected in got, got
    else:
        assert got == expected


def test_an_empty_dump_is_refused_where_it_is_loaded(tmp_path):
    write(tmp_path / "own", changed(AMAZON, r__json=""))
    with pytest.raises(ValueError, match="own leaves no row for train: bring more interactions"):
        sources.load(replace(settings("laptop"), dataset="own", data_path=str(tmp_path / "own")))


def test_the_tables_of_movielens_100k_are_what_they_were():
    try:
        items, interactions = sources.read_recbole(sources.movielens_100k())
    except sources.FetchError as error:
        pytest.skip(str(error))
    tables = data.split_interactions(items, interactions, "leave-one-out", 24)
    assert training.digest_of(tables) == "49576a05a814"


def test_eight_groups_need_eight_titles_and_the_message_says_so():
    with pytest.raises(ValueError, match="8 popularity groups need as many titles with counts, not 5: bring more"):
        metrics.popularity_groups([5, 4, 3, 2, 1, 0])


# --- naive readings, by loops over cells; they see what the readers accept ---


def naive_text(path):
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n").rstrip("\n") + "\n"


def naive_rows(path, sep, columns=None):
    """Rows as dictionaries, from a loop over characters; quotes count in CSV alone, at the beginning of a cell."""
    rows, row, cell, quoted, fresh = [], [], "", False, True
    text = naive_text(path).replace(sep, "\t") if len(sep) > 1 else naive_text(path)
    sep, at = "\t" if len(sep) > 1 else sep, 0
    while at < len(text):
        c = text[at]
        if quoted and c == '"':
            if text[at + 1] == '"':
                cell, at = cell + '"', at + 1
            else:
                quoted = False
        elif quoted:
            cell += c
        elif c == '"' and fresh and sep == ",":
            quoted, fresh = True, False
        elif c in (sep, "\n"):
            row, cell, fresh = [*row, cell], "", True
            if c == "\n":
                rows, row = [*rows, row], []
        else:
            cell, fresh = cell + c, False
        at += 1
    assert not quoted and not row
    head = columns or [name.strip().replace("\n", " ").split(":")[0] for name in rows.pop(0)]
    assert {len(row) for row in rows} == {len(head)}
    return [list(zip(head, row)) for row in rows]


def the_cell(row, name):
    (cell,) = [cell for key, cell in row if key == name]
    return cell


def plain(cell):
    assert type(cell) in (int, str), cell
    return cell


def naive_any(path):
    """Rows as lists of (name, cell)."""
    if path.suffix == ".csv":
        return naive_rows(path, ",")
    if path.suffix == ".parquet":
        table = pq.ParquetFile(path).read()
        columns = [column.to_pylist() for column in table.columns]
        return [list(zip(table.column_names, row)) for row in zip(*columns)]
    content = json.loads(naive_text(path), object_pairs_hook=tuple)
    if type(content) is tuple:
        return [list(enumerate(pair)) for pair in content]
    return [list(dict(row).items()) if type(row) is tuple else list(enumerate(row if type(row) is list else [row]))
            for row in content]


def naive_counts(folder):
    counts = Counter()
    for row in naive_any(only(folder)):
        names = [name for name, _ in row]
        if not {"title", "count"} <= set(names):
            assert len(names) == 2
            first = names[1] in ("title", "item_id") and names[0] not in ("title", "item_id") or names[0] == "count"
            row = [("title", row[first][1]), ("count", row[1 - first][1])]
        number = the_cell(row, "count")
        assert type(number) in (int, float, str, decimal.Decimal) and 0 < float(number) < 1e15
        counts[data.clean_title(str(plain(the_cell(row, "title"))))] += float(number)
    assert len(counts) > 1 and not any(map(data.is_blank, counts))
    return dict(counts)


def naive_lists(folder):
    titles = []
    for row in naive_any(only(folder)):
        names = [name for name, _ in row]
        name = next((name for name in ("title", "item_id") if name in names), names[0] if len(names) == 1 else None)
        titles.append(data.clean_title(str(plain(the_cell(row, name)))))
    assert not any(map(data.is_blank, titles))
    return titles


def naive_film(title, year=""):
    """The title without its year, article in front, and the year."""
    found = re.fullmatch(r"(.+?)\s*\((\d\d\d\d)(?:[-–]\d{0,4})?\)(?:\s*\((?:V|TV)\))?", title)
    if found and not data.is_blank(found[1]):
        title = found[1]
    for article in ("The", "An", "A"):
        if title.endswith(f", {article}") and len(title) > len(article) + 2:
            title = f"{article} {title.removesuffix(f', {article}')}"
            break
    return title, year if re.fullmatch("[0-9]{4}", year) else found and found[2]


def naive_dataset(items, interactions, films):
    """items: (id, title, year), interactions: (user, item, time), as text."""
    ids = [item for item, _, _ in items]
    assert len(set(ids)) == len(ids)
    titles = {item: data.clean_title(title) for item, title, _ in items}
    assert not any(map(data.is_blank, titles.values()))
    unknown = [item for item in ids if films and titles[item].casefold() in ("unknown", "unkonwn")]
    if films:
        made = {item: naive_film(titles[item], year) for item, _, year in items}
        years = {}
        for title, year in made.values():
            years.setdefault(title, set()).update([year] if year else [])
        titles = {item: f"{title} ({year})" if year and len(years[title]) > 1 else title
                  for item, (title, year) in made.items()}
    assert all(item in titles and user.strip() and item.strip() for user, item, _ in interactions)
    kept = [item for item in ids if item not in unknown]
    log = [(user, item, int(float(time))) for user, item, time in interactions if item not in unknown]
    number = re.compile("0|[1-9][0-9]{0,17}")
    if all(map(number.fullmatch, kept)):
        kept, log = list(map(int, kept)), [(user, int(item), time) for user, item, time in log]
        titles = {int(item): title for item, title in titles.items() if item not in unknown}
    if all(number.fullmatch(user) for user, _, _ in log):
        log = [(int(user), item, time) for user, item, time in log]
    return [(item, titles[item]) for item in kept], log


def naive_recbole(folder):
    (item,), (inter,) = folder.glob("*.item"), folder.glob("*.inter")
    rows = naive_rows(item, "\t")
    names = [name for name, _ in rows[0]]
    title = next(name for name in ("movie_title", "title", "item_title", "name") if name in names)
    films = title == "movie_title"
    year = "release_year" if films and "release_year" in names else None
    items = [(the_cell(row, "item_id"), the_cell(row, title), the_cell(row, year) if year else "") for row in rows]
    return naive_dataset(items, [tuple(the_cell(row, name) for name in sources.INTERACTION)
                                 for row in naive_rows(inter, "\t")], films)


def naive_movielens(folder):
    seps = {"u.data": ("\t", "u.item", "|"), "ratings.dat": ("::", "movies.dat", "::"),
            "ratings.csv": (",", "movies.csv", ",")}
    ratings = next(name for name in seps if (folder / name).exists())
    sep, films, film_sep = seps[ratings]
    columns, film_columns = (None, None) if sep == "," else (
        ["userId", "movieId", "rating", "timestamp"],
        ["movieId", "title", *map(str, range(22))] if film_sep == "|" else ["movieId", "title", "genres"])
    items = [(the_cell(row, "movieId"), the_cell(row, "title"), "")
             for row in naive_rows(folder / films, film_sep, film_columns)]
    return naive_dataset(items, [tuple(the_cell(row, name) for name in ("userId", "movieId", "timestamp"))
                                 for row in naive_rows(folder / ratings, sep, columns)], True)


def naive_json_lines(folder, name):
    path = next(path for path in folder.iterdir() if path.name.startswith(name))
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode(errors="surrogateescape")  # a field that is not read may be in any encoding
    text = text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n") if text]


def naive_amazon(folder):
    log = [(row["reviewerID"], row["asin"], row["unixReviewTime"]) for row in naive_json_lines(folder, "r.")]
    assert all(type(user) is type(item) is str and user and item and type(when) is int for user, item, when in log)
    reviewed, titles = {item for _, item, _ in log}, {}
    for row in naive_json_lines(folder, "meta_r."):
        title = row.get("title")
        title = data.clean_title(title) if type(title) is str and len(title) <= 10_000 else ""
        if row["asin"] in reviewed and not data.is_blank(title):
            titles.setdefault(row["asin"], title)
    return list(titles.items()), [row for row in log if row[1] in titles]


def naive_processed(folder):
    rows = naive_any(folder / "items.parquet")
    ids, titles = ([plain(the_cell(row, name)) for row in rows] for name in ("item_id", "title"))
    assert len(set(ids)) == len(ids) and not any(data.is_blank(str(title)) for title in titles)
    columns = [ids, list(map(str, titles))]
    for part in data.PARTS:
        rows = naive_any(folder / f"{part}.parquet")
        histories, targets = ([the_cell(row, name) for row in rows] for name in ("history", "target"))
        assert all(histories) and {plain(item) for history in histories for item in history} <= set(ids)
        assert {plain(target) for target in targets} <= set(ids)
        columns += [histories, targets]
        if rows and "user_id" in dict(rows[0]):
            columns.append([plain(the_cell(row, "user_id")) for row in rows])
    return columns


NAIVE = {"counts": naive_counts, "lists": naive_lists, "recbole": naive_recbole, "movielens": naive_movielens,
         "amazon": naive_amazon, "processed": naive_processed}
TALLY = Counter()


def right_or_refused(reader, files):
    """Whether the files are read; then a naive reading agrees. `read` has looked at what is said otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        folder = write(Path(folder) / "own", files)
        got = read(reader, folder)
        TALLY["refused" if isinstance(got, str) else "read"] += 1
        if isinstance(got, str):
            return False
        expected = NAIVE[reader](folder)
        if reader == "counts":
            assert got == pytest.approx(expected, rel=1e-12) and set(got) == set(expected)
        else:
            assert list(map(list, got)) == list(map(list, expected)) if reader in ("recbole", "movielens", "amazon") \
                else got == expected
        return True


def said(capsys, what):
    with capsys.disabled():
        if HARD:
            print(f"\n{what}: " + ", ".join(f"{key} {n:,}" for key, n in sorted(TALLY.items())))
    TALLY.clear()


@pytest.fixture(autouse=True)
def none_counted():
    TALLY.clear()


def tried(n):
    return hypothesis_settings(max_examples=n, deadline=None, derandomize=True, database=None,
                               suppress_health_check=list(HealthCheck))


# --- good files of every format, damaged ---

FILMS = ["Toy Story (1995)", "Matrix, The (1999)", "Heat (1995)", "Heat (1972)", "unknown", "Ünï 🌻 (2001)", "A, B", "x"]


def good_files():
    rows = [(user, item, 100 * user + item) for user in range(1, 4) for item in range(8) if (user + item) % 2]
    dat = "".join(f"{u}::{i}::3::{t}\n" for u, i, t in rows)
    quoted = io.StringIO()
    csv.writer(quoted).writerows([["title", "count"], *([title, n + 1] for n, title in enumerate(FILMS))])
    listed = io.StringIO()
    csv.writer(listed).writerows([["user", "title"], *([n, title] for n, title in enumerate(FILMS * 2))])
    movies = io.StringIO()
    csv.writer(movies).writerows([["movieId", "title", "genres"], *([i, t, "x|y"] for i, t in enumerate(FILMS))])
    reviews = [{"reviewerID": f"u{u}", "asin": f"A{i}", "unixReviewTime": t} for u, i, t in rows]
    reviews = "".join(json.dumps(review) + "\n" for review in reviews)
    meta = "".join(json.dumps({"asin": f"A{i}", "title": t}, ensure_ascii=False) + "\n" for i, t in enumerate(FILMS))
    part = {"history": [[1], [1, 2], [3, 1, 2]], "target": [2, 3, 4], "user_id": [7, 7, 8], "timestamp": [1, 2, 3]}
    items = {"item_id": list(range(8)), "title": FILMS}
    item = "".join(f"{i}\t{title}\t{1990 + i}\n" for i, title in enumerate(FILMS))
    inter = INTER + "".join(f"{u}\t{i}\t{t}.0\n" for u, i, t in rows)
    film = "|".join("0" * 22)
    records = [{"title": title, "count": n + 1} for n, title in enumerate(FILMS)]
    dots = "".join(f"{i}::{title}::x\n" for i, title in enumerate(FILMS))
    bars = "".join(f"{i}|{title}|{film}\n" for i, title in enumerate(FILMS))
    good = {
        "counts.csv": ("counts", {"c.csv": quoted.getvalue()}),
        "counts.json": ("counts", {"c.json": json.dumps({t: n + 1 for n, t in enumerate(FILMS)}, ensure_ascii=False)}),
        "counts of records": ("counts", {"c.json": json.dumps(records)}),
        "counts.parquet": ("counts", {"c.parquet": {"title": FILMS, "count": list(range(1, 9))}}),
        "lists.csv": ("lists", {"c.csv": listed.getvalue()}),
        "lists.json": ("lists", {"c.json": json.dumps(FILMS)}),
        "lists.parquet": ("lists", {"c.parquet": {"item_id": list(range(8)), "rank": [1] * 8}}),
        "RecBole, films": ("recbole", {"a.item": "item_id\tmovie_title\trelease_year\n" + item, "a.inter": inter}),
        "RecBole": ("recbole", {"a.item": "item_id:token\ttitle:token_seq\tx:float\n" + item, "a.inter": inter}),
        "MovieLens-100K": ("movielens", {"u.item": bars, "u.data": dat.replace("::", "\t")}),
        "MovieLens-1M": ("movielens", {"movies.dat": dots, "ratings.dat": dat}),
        "MovieLens, CSV": ("movielens", {
            "movies.csv": movies.getvalue(),
            "ratings.csv": "userId,movieId,rating,timestamp\n" + dat.replace("::", ",")}),
        "Amazon": ("amazon", {"r.json": reviews, "meta_r.json": meta}),
        "Amazon, gzipped": ("amazon", {"r.json.gz": gzip.compress(reviews.encode(), mtime=0), "meta_r.json": meta}),
        "processed": ("processed", {"items.parquet": items} | {f"{name}.parquet": part for name in data.PARTS}),
    }
    with tempfile.TemporaryDirectory() as folder:
        return {name: (reader, {path.name: path.read_bytes() for path in write(Path(folder) / name, files).iterdir()})
                for name, (reader, files) in good.items()}


GOOD = good_files()
PIECES = [b",", b"\n", b"\r", b"\r\n", b'"', b"\t", b"::", b"|", b" ", b"\0", b"\xff", b"\xe9", BOM.encode(), b"007",
          b"0", b"1e30", b"-1", b"nan", b"true", b"null", b"[", b"]", b"{", b"}", b":", b"\\ud800", "\u200b".encode(),
          b"<br>", "é".encode(), b"&amp;", b"Heat", b"1", b"(1999)", b";"]
EDITS = st.lists(st.tuples(
    st.sampled_from(["insert", "replace", "cut", "double", "end", "line"]), st.floats(0, 1, exclude_max=True),
    st.integers(1, 12), st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=4))), min_size=1, max_size=2)


def edited(raw, edits):
    for how, where, size, piece in edits:
        at = int(where * len(raw))
        if how == "insert":
            raw = raw[:at] + piece + raw[at:]
        elif how == "replace":
            raw = raw[:at] + piece + raw[at + len(piece):]
        elif how == "cut":
            raw = raw[:at] + raw[at + size:]
        elif how == "double":
            raw = raw[:at + size] + raw[at:]
        elif how == "end" and where > 0.8:
            raw = raw[:at]
        elif how == "line":  # a line stands twice
            end = raw.find(b"\n", at) + 1
            raw = raw[:end] + raw[raw.rfind(b"\n", 0, max(end - 1, 0)) + 1:end] + raw[end:]
    return raw


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_file_is_read(kind):
    assert right_or_refused(*GOOD[kind])


@pytest.mark.parametrize("kind", GOOD)
def test_a_damaged_file_is_read_right_or_refused(kind, capsys):
    reader, files = GOOD[kind]

    @tried(DAMAGED)
    @given(st.sampled_from(sorted(files)), EDITS, st.booleans())
    def check(name, edits, unpacked):
        raw = files[name]
        if name.endswith(".gz") and unpacked:
            raw = gzip.compress(edited(gzip.decompress(raw), edits), 1)
        else:
            raw = edited(raw, edits)
        right_or_refused(reader, files | {name: raw})

    check()
    said(capsys, f"damaged, {kind}")


@pytest.mark.parametrize("kind", GOOD)
def test_random_bytes_are_read_right_or_refused(kind, capsys):
    reader, files = GOOD[kind]
    text = st.lists(st.sampled_from([*PIECES, b"title", b"count", b"item_id", b"PAR1"]), max_size=30).map(b"".join)

    @tried(RANDOM)
    @given(st.sampled_from(sorted(files)), st.one_of(st.binary(max_size=60), text))
    def check(name, raw):
        right_or_refused(reader, files | {name: raw})

    check()
    said(capsys, f"random, {kind}")


# --- columns of every type ---

SCALARS = st.one_of(
    st.integers(-3, 9), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=4),
    st.sampled_from(["Heat", "Fargo", "007", "7", "3", "1e5"]))
CELLS = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=2), SCALARS, max_size=2))
NAMES = st.sampled_from(["title", "count", "item_id", "x", "{}", ""])
ARROW = [pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(),
         pa.binary(), pa.timestamp("us"), pa.date32(), pa.duration("s"), pa.decimal128(9, 2), pa.list_(pa.int64()),
         pa.list_(pa.string()), pa.list_(pa.list_(pa.int64())), pa.large_list(pa.int32()), pa.list_(pa.bool_()),
         pa.struct([("a", pa.int64())]), pa.null(), pa.time32("s"), pa.list_(pa.float64())]


def arrow_cell(kind, n):
    """A cell of this type that stands for a small whole number."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [arrow_cell(kind.value_type, k) for k in range(1, n + 1)]
    if pa.types.is_struct(kind):
        return {"a": n}
    for test, make in (
        (pa.types.is_integer, int), (pa.types.is_floating, float), (pa.types.is_boolean, bool),
        (pa.types.is_decimal, decimal.Decimal), (pa.types.is_binary, lambda n: str(n).encode()),
        (pa.types.is_null, lambda n: None), (pa.types.is_timestamp, lambda n: DAY),
        (pa.types.is_date, lambda n: DAY.date()), (pa.types.is_duration, lambda n: datetime.timedelta(n)),
        (pa.types.is_time, lambda n: DAY.time()),
    ):
        if test(kind):
            return make(n)
    return str(n)


@st.composite
def arrow_columns(draw, n):
    kind = draw(st.sampled_from(ARROW) | st.sampled_from([pa.int64(), pa.string(), pa.list_(pa.int64())]))
    cells = [None if draw(st.integers(0, 9)) == 9 else arrow_cell(kind, draw(st.integers(1, 4))) for _ in range(n)]
    column = pa.array(cells, kind)
    if draw(st.booleans()) and (pa.types.is_string(kind) or pa.types.is_integer(kind)):
        column = column.dictionary_encode()
    return column


def test_json_of_every_kind_is_read_right_or_refused(capsys):
    records = st.lists(st.dictionaries(NAMES, CELLS, max_size=3), max_size=4)
    pairs = st.lists(st.tuples(CELLS, CELLS), max_size=4)
    title, number = st.text(min_size=1, max_size=3) | st.integers(), st.integers(0, 9) | st.floats(-1, 9) | st.just("3")
    good = st.lists(st.fixed_dictionaries({"title": title, "count": number}, optional={"x": CELLS}), max_size=4)

    @tried(DAMAGED * 2)
    @given(st.one_of(good, st.dictionaries(st.text(max_size=3), number), st.lists(title), records, pairs,
                     st.lists(CELLS, max_size=4), st.dictionaries(st.text(max_size=3), CELLS), CELLS),
           st.sampled_from(["counts", "lists"]))
    def check(content, reader):
        right_or_refused(reader, {"c.json": json.dumps(content)})

    check()
    said(capsys, "JSON of every kind")


def test_parquet_of_every_type_is_read_right_or_refused(capsys):
    @tried(DAMAGED * 2)
    @given(st.data(), st.sampled_from(["counts", "lists", "processed"]))
    def check(draws, reader):
        n = draws.draw(st.integers(0, 3))
        if reader == "processed":
            _, files = GOOD["processed"]
            name = draws.draw(st.sampled_from(sorted(files)))
            table = pq.ParquetFile(io.BytesIO(files[name])).read()
            at = draws.draw(st.integers(0, table.num_columns - 1))
            column = draws.draw(arrow_columns(table.num_rows))
            right_or_refused(reader, files | {name: table.set_column(at, table.column_names[at], column)})
        else:
            names = draws.draw(st.lists(NAMES, min_size=1, max_size=3))
            columns = [draws.draw(arrow_columns(n)) for _ in names]
            right_or_refused(reader, {"c.parquet": pa.table(columns, names)})

    check()
    said(capsys, "Parquet of every type")


# --- catalogues ---

WORDS = ["The", "the", "Heat", "Heat 2", "2", "II", ":", "–", "🌻", "👨\u200d👩\u200d👧", "é", "e\u0301", "שלום", "日本", "日",
         "\u200bx", "<x", "a&b", "\\n", '"', "x" * 40, "007", "7"]


@st.composite
def catalogues(draw):
    """Clean titles that share beginnings; some stand twice."""
    words = draw(st.lists(st.sampled_from(WORDS) | st.text(min_size=1, max_size=4), min_size=1, max_size=6))
    title = st.lists(st.sampled_from(words), min_size=1, max_size=5).map(" ".join).map(data.clean_title)
    return draw(st.lists(title.filter(lambda t: not data.is_blank(t)), min_size=1, max_size=draw(st.integers(1, 14))))


def test_random_catalogues_are_trees_that_conserve_flow(capsys):
    checked = Counter()

    @tried(CATALOGUES)
    @given(catalogues(), st.integers(0, 2**31), st.integers(0, 9))
    def check(titles, seed, chance):
        model, tokenizer = tiny_model([*titles, *prompt_texts("movie", "sequence")], seed=seed)
        catalogue = Catalogue.build(tokenizer, titles, "movie")
        trie, sequences = catalogue.trie, catalogue.sequences
        assert [tokenizer.decode(ids[:-1]) for ids in sequences] == titles
        numbers = {}
        leaves = [numbers.setdefault(title, len(numbers)) for title in titles]
        assert trie.item_leaf.tolist() == data.item_leaves(titles).tolist() == leaves
        rewards = torch.rand(len(titles), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9 + 1e-6
        below = {}  # every beginning of a title: the reward below it
        for ids, reward in zip(sequences, rewards.tolist()):
            for n in range(len(ids) + 1):
                below[(*ids[:n],)] = below.get((*ids[:n],), 0) + reward
        paths = [()]
        for parent, token in zip(trie.parent.tolist()[1:], trie.token.tolist()[1:]):
            paths.append((*paths[parent], token))
        assert len(paths) == len(below) and set(paths) == set(below)
        flows = trie.log_flows(rewards.log()).exp().tolist()
        assert flows == pytest.approx([below[path] for path in paths], rel=1e-9)
        policy = trie.log_leaf_probs(trie.log_token_rewards(rewards.log())).exp().tolist()
        shares = np.bincount(leaves, rewards.numpy() / float(rewards.sum()))
        assert policy == pytest.approx(shares.tolist(), rel=1e-9)
        checked["catalogues"] += 1
        checked["nodes"] += trie.n_nodes
        if chance and HARD:  # a model costs most of the time
            return
        with torch.no_grad():
            for weights in model.eval().parameters():
                weights.mul_(3)
            history = [seed % len(titles)]
            [(found, scores)] = beam_search(model, catalogue, [history], [Beams(len(numbers), seen_allowed=True)])
            context = catalogue.context(history)
            exact = {}
            for leaf, ids in zip(leaves, sequences):
                log_p = model(torch.tensor([context + ids])).logits[0, len(context) - 1:-1].double().log_softmax(-1)
                exact[leaf] = log_p[torch.arange(len(ids)), torch.tensor(ids)].sum().item()
        assert sorted(found[0].tolist()) == sorted(exact) and (np.diff(scores[0]) <= 0).all()
        assert scores[0].tolist() == pytest.approx([exact[leaf] for leaf in found[0].tolist()], abs=1e-3)
        checked["beams"] += len(exact)

    check()
    TALLY.update(checked)
    said(capsys, "random catalogues")
