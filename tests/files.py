"""Small files as users bring them, for the tests of sources."""

import gzip
import json

HEAD = "item_id:token\tmovie_title:token_seq\n"
RATES = "user_id:token\titem_id:token\ttimestamp:float\n"


def put(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def recbole(
    folder,
    item=HEAD + "10\tToy Story\n20\tHeat\n",
    inter=RATES + "1\t10\t5.0\n1\t20\t6\n2\t20\t7\n",
):
    put(folder / "a.item", item)
    put(folder / "a.inter", inter)
    return folder


def jsonl(path, *rows):
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def review(user, asin, when):
    return {"reviewerID": user, "asin": asin, "unixReviewTime": when, "overall": 5.0}
