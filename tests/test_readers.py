"""Readers and titles, on hand-made files."""

import json

import pytest
from files import HEAD, RATES, jsonl, put, recbole, review
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerlib import readers

prove = settings(max_examples=60, deadline=None, derandomize=True)
FILMS = ["Toy Story", "Heat"]
RATED = [[1, 10, 5], [1, 20, 6], [2, 20, 7]]


def test_recbole(tmp_path):
    items, interactions = readers.read_recbole(recbole(tmp_path))
    assert items.to_dict("list") == {"item_id": [10, 20], "title": FILMS}
    assert interactions.to_numpy().tolist() == RATED


def test_recbole_of_other_things_keeps_ids_years_and_articles(tmp_path):
    item = "item_id:token\ttitle:token_seq\nB01\tRules, The (1999)\nB02\tA \"quoted\" &amp; odd, one\n"
    inter = "\ufefftimestamp:float\titem_id:token\tuser_id:token\r\n3\tB02\tu1\r\n"
    items, interactions = readers.read_recbole(recbole(tmp_path, item, inter))
    assert items.title.tolist() == ["Rules, The (1999)", 'A "quoted" & odd, one']
    assert interactions.to_numpy().tolist() == [["u1", "B02", 3]]


def test_recbole_keeps_leading_zeros_apart(tmp_path):
    item = "item_id:token\ttitle:token_seq\n1\tOne\n01\tOther\n"
    items, _ = readers.read_recbole(recbole(tmp_path, item, "user_id\titem_id\ttimestamp\n1\t01\t5\n"))
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
    items, interactions = readers.read_movielens(tmp_path)
    assert items.item_id.tolist() == [10, 20] and items.title.tolist() == titles
    assert interactions.to_numpy().tolist() == RATED


@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_amazon(tmp_path, ending, capsys):
    reviews = jsonl(tmp_path / f"r.{ending}", review("u", "A", 86400), review("u", "B", 86401), review("v", "C", 1))
    products = [{"asin": "A"}, {"asin": "A", "title": "<b>Tom</b> &amp; Jerry"}, {"asin": "A", "title": "late"},
                {"asin": "B", "title": " "}, {"asin": "C", "title": "Ü"}, {"asin": "D", "title": "unreviewed"}]
    meta = jsonl(tmp_path / f"meta_r.{ending}", *products)
    items, interactions = readers.read_amazon(reviews, meta)
    assert items.to_numpy().tolist() == [["A", "Tom & Jerry"], ["C", "Ü"]]
    assert interactions.to_numpy().tolist() == [["u", "A", 86400], ["v", "C", 1]]
    assert capsys.readouterr().out == "dropped 1 items without a title and their 1 reviews\n"
    assert readers.read_amazon(reviews, meta, since="1970-01-02")[1].item_id.tolist() == ["A"]  # inclusive
    assert readers.read_amazon(reviews, meta, until="1970-01-02")[1].item_id.tolist() == ["C"]  # exclusive


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
    assert readers.clean_title(raw) == clean


@prove
@given(st.text(st.sampled_from("&ampltg;#39<>/b!- \t\n\u0301e\u00e9🌻") | st.characters(), max_size=30))
def test_cleaning_twice_is_cleaning_once(raw):
    clean = readers.clean_title(raw)
    assert readers.clean_title(clean) == clean == clean.strip()
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
    assert readers.move_article(raw) == moved


def test_films_lose_their_year_but_remakes_keep_it_and_unknown_goes(tmp_path, capsys):
    titles = ["Sabrina (1995)", "Sabrina (1954)", "Matrix, The (1999)", "Heat (1995)", "Heat (1995)", "unkonwn",
              "Land Before Time III (1995) (V)", "1984", "Twin Peaks (1990-1991)", "Brazil (Director's Cut)"]
    rows = "".join(f'{i},"{title}",x\n' for i, title in enumerate(titles))
    put(tmp_path / "movies.csv", "movieId,title,genres\n" + rows)
    put(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,5,3,1\n1,0,3,2\n")
    items, interactions = readers.read_movielens(tmp_path)
    assert items.title.tolist() == ["Sabrina (1995)", "Sabrina (1954)", "The Matrix", "Heat", "Heat",
                                    "Land Before Time III", "1984", "Twin Peaks", "Brazil (Director's Cut)"]
    assert 5 not in items.item_id.tolist() and interactions.item_id.tolist() == [0]
    assert capsys.readouterr().out == "dropped item 5, of unknown title, and its 1 ratings\n"


def test_a_film_that_is_called_unknown_with_its_year_stays(tmp_path, capsys):
    put(tmp_path / "movies.csv", "movieId,title,genres\n1,Unknown (2011),x\n2,Heat (1995),x\n")
    put(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,1,5,3\n")
    assert readers.read_movielens(tmp_path)[0].title.tolist() == ["Unknown", "Heat"]
    assert capsys.readouterr().out == ""


def test_recbole_with_two_title_columns_takes_the_films(tmp_path):
    item = "item_id:token\tmovie_title:token_seq\ttitle:token_seq\n10\tToy Story\tx\n20\tHeat\ty\n"
    assert readers.read_recbole(recbole(tmp_path, item=item))[0].title.tolist() == ["Toy Story", "Heat"]
    with pytest.raises(ValueError, match="has two columns item_id"):
        readers.read_recbole(recbole(tmp_path, item="item_id:token\titem_id:token\ttitle:token_seq\n1\t1\tx\n"))


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": HEAD + "10\tToy\n20\tHeat\textra\n"}, r"a\.item, line 3: 3 fields instead of 2"),
        ({"item": HEAD + "10\tToy\n\n20\tHeat\n"}, r"a\.item, line 3: the item_id is empty"),
        ({"item": HEAD}, r"a\.item has no rows"),
        ({"item": ""}, r"a\.item has no rows"),
        ({"item": "item_id:token\tgenre:token\n10\tx\n"}, r"a\.item has no title column"),
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
        ({"inter": RATES + "1\t10\t5\n1\t2"}, r"a\.inter, line 3: 2 fields instead of 3"),  # truncated
    ],
)
def test_bad_recbole(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        readers.read_recbole(recbole(tmp_path, **change))


def test_missing_and_surplus_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds 0 files \*\.inter"):
        readers.read_recbole(tmp_path)
    put(recbole(tmp_path) / "b.item", "x")
    with pytest.raises(ValueError, match=r"holds 2 files \*\.item: exactly one"):
        readers.read_recbole(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of u\.data, ratings\.dat and ratings\.csv"):
        readers.read_movielens(tmp_path)
    put(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,10,3,5\n")
    with pytest.raises(FileNotFoundError, match=r"movies\.csv is missing"):
        readers.read_movielens(tmp_path)


def test_bad_movielens(tmp_path):
    movielens_csv(tmp_path)
    put(tmp_path / "movies.csv", "movieId,title,genres\n10,Toy\n")
    with pytest.raises(ValueError, match=r"movies\.csv, line 2: 2 fields instead of 3"):
        readers.read_movielens(tmp_path)
    put(tmp_path / "movies.csv", "movieId,title,genres\n10,Toy,x\n20,Caf\u00e9,x\n", "latin-1")
    with pytest.raises(ValueError, match=r"movies\.csv, line 3: not UTF-8"):
        readers.read_movielens(tmp_path)
    movielens_1m(tmp_path)  # .dat goes before .csv
    put(tmp_path / "ratings.dat", "1::10::3::5\n1::20::1\n")
    with pytest.raises(ValueError, match=r"ratings\.dat, line 2: 3 fields instead of 4"):
        readers.read_movielens(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"asin": "A"}', r"r\.json, line 2: a review needs"),
        ('{"reviewerID": "u", "asin": "A", "unixReviewTime": "1"}', r"r\.json, line 2: a review needs"),
        ("[1]", r"r\.json, line 2: not a JSON object"),
        ("{'asin': 'A'}", r"r\.json, line 2: not a JSON object"),
    ],
)
def test_bad_amazon_reviews(tmp_path, line, message):
    put(tmp_path / "r.json", json.dumps(review("u", "A", 1)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        readers.read_amazon(tmp_path / "r.json", jsonl(tmp_path / "meta_r.json", {"asin": "A", "title": "x"}))


@pytest.mark.parametrize("product", [{"title": "x"}, {"asin": ["A"], "title": "x"}, {"asin": None}])
def test_bad_amazon_products(tmp_path, product):
    reviews = jsonl(tmp_path / "r.json", review("u", "A", 1))
    with pytest.raises(ValueError, match=r"meta_r\.json, line 1: a product needs asin"):
        readers.read_amazon(reviews, jsonl(tmp_path / "meta_r.json", product))


def test_damaged_amazon(tmp_path):
    reviews = jsonl(tmp_path / "r.json.gz", *(review(f"u{i}", "A", i) for i in range(2000)))
    whole = reviews.read_bytes()
    for broken in (whole[: len(whole) // 2], b"no gzip at all"):
        reviews.write_bytes(broken)
        with pytest.raises(ValueError, match=r"r\.json\.gz is damaged after line \d+: download it again"):
            readers.read_amazon(reviews, tmp_path / "meta_r.json")
    with pytest.raises(FileNotFoundError):
        readers.read_amazon(tmp_path / "none.json", tmp_path / "meta_r.json")
