"""Every exercise says that it is not attempted, takes its answer in notebooks/solutions and refuses wrong ones. The
answers change no result: the same seed gives the same numbers."""

import ast
import re
import textwrap

import another_house
import nbformat
import pytest

from flowerlib.lab import reproduce, runs

WRONG = {  # answers to each exercise that a reader may well give; numbers alone are guesses that a check might take
    "flow_of_star": ["return 31 + 9 + 11, 51 / 119"],
    "tamed_alpha": ["return 0.5", "return -0.2876"],
    "trajectory_balance": ["return (log_pi - log_r).sum(-1).square().mean()"],
    "draw_list": ["return np.argsort(-p)[:k]", "return rng.choice(len(p), size=k, p=p)"],
    "most_popular": ["return popular[:10]", "return [item for item in popular[:10] if item not in seen]"],
    "gini_by_hand": ["return np.abs(x - x.mean()).mean() / x.mean()", "return 0.0"],
    "bits_of_the_title": ["return -log_pf.sum().item()", "return -log_pf.mean().item() / math.log(2)"],
    "share_of_decisions": ["return (children > 1).float().mean()", "return 3.5 / 4.5",
                           "return log_pf[0] / log_pf.sum()"],
    "all_different": ["return 1.0", "return (1 - share).prod()"],
    "balanced_as_a_whole": ["return log_r.clone()", "return torch.zeros_like(log_r)"],
    "hit_rate_on_the_tail": ["return 2.0", "return (lists == target_leaves[:, None]).any(1).mean() + 1"],
    "fair_and_useless": ["return np.tile(np.argsort(-counts)[:k], (n_users, 1))"],
    "ghosts_needed": ["return 2", "return 3"],
    "node_share": ["return reach * float((pi * np.log(pi / r)).sum())", "return float((r * np.log(r / pi)).sum())"],
    "mended_reward": ["return log_target", "return log_target - log_reference"],
    "titles_for_half": ["return len(slots) // 2"],
    "fair_with_few": ["return counts"],
    "undominated": ["return {(row['method'], row.get('reward')) for row in rows_of}", "return set()"],
    "changed": ["return np.mean(one != other) * one.shape[1]", "return 0.0",
                "return np.mean([len(set(a) ^ set(b)) for a, b in zip(one.tolist(), other.tolist())])"],
    "packed_over_rows": ["return 1 / n"],
    "tree_over_rows": ["return trie.n_nodes / sum(lengths)", "return 9 / 14 + 0.1"],
}
SOLUTIONS = sorted((reproduce.FOLDER / "solutions").glob("*.py"))


def functions(source):
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef)}


def text(path):
    """What an executed notebook has printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(out.text for cell in cells for out in cell.get("outputs", []) if out.get("name") == "stdout")


def answered(path):
    """A notebook with its solutions and, before each, with wrong answers; exercises it lacks; how many are wrong."""
    notebook, wrong_answers = nbformat.read(reproduce.FOLDER / f"{path.stem}.ipynb", as_version=4), 0
    cells, left = [], functions(path.read_text(encoding="utf-8"))
    for cell in notebook.cells:
        stubs = functions(cell.source) if cell.cell_type == "code" else {}
        for name, stub in stubs.items():
            if stub.endswith("return None") and name in left:
                for number, answer in enumerate(WRONG[name]):
                    wrong = cell.source.replace(stub, stub.replace("return None", answer))
                    cells.append(nbformat.v4.new_code_cell(
                        f"try:\n{textwrap.indent(wrong, '    ')}\n    print('taken: {name} {number}')\n"
                        "except AssertionError as error:\n    print('refused:', error)"
                    ))
                cell.metadata["tags"] = ["raises-exception"]  # the other exercises are run all the same
                wrong_answers += len(WRONG[name])
                cell.source = cell.source.replace(stub, left.pop(name))
        cells.append(cell)
    notebook.cells = cells
    return notebook, left, wrong_answers


@pytest.fixture(scope="session")
def again(once):
    """The folder of another whole run at `smoke`, from notebooks whose exercises are answered."""

    def make(house):
        another_house.build(house)
        for path in SOLUTIONS:
            nbformat.write(answered(path)[0], house / "notebooks" / f"{path.stem}.ipynb")
        names = (reproduce.BY_HAND, *reproduce.NOTEBOOKS, *reproduce.STUDIES)
        another_house.run(house, house / "run", *(f"--only={name[:-6]}" for name in names))

    return once("house", make) / "run"


@pytest.mark.long
def test_the_same_seed_gives_the_same_results_but_for_times_whatever_is_answered(smoke, again):
    results = {path for path in (smoke / "results").glob("*.json") if path.name[:2] != reproduce.SPEED[:2]}
    assert len(results) > 6
    for path in sorted(results):
        first, second = (runs.read_document(folder / "results" / path.name) for folder in (smoke, again))
        for document in (first, second):
            del document["provenance"]["commit"]  # the other house is no repository
            for part in (document["provenance"], *document["rows"]):
                for key in [key for key in part if "seconds" in key or key == "made_at"]:
                    del part[key]
        assert first == second, path.name
    first, second = ({made.parent.name for made in run.glob("*/*/made.json")} for run in (smoke, again))
    assert first == second


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_pass_and_wrong_answers_are_refused_with_a_reason(path, smoke, again):
    _, left, wrong_answers = answered(path)
    assert not left, "the notebook has no such exercise"
    out = text(again / "notebooks" / f"{path.stem}.ipynb")
    assert re.findall("^taken: .*", out, re.MULTILINE) == []
    assert "not attempted" not in out and out.count("correct") == len(functions(path.read_text(encoding="utf-8")))
    assert len(re.findall("^refused: .{10}", out, re.MULTILINE)) == wrong_answers
    if path.stem + ".ipynb" != reproduce.BY_HAND:
        as_it_stands = text(smoke / "notebooks" / f"{path.stem}.ipynb")
        assert as_it_stands.count("exercise not attempted yet") == out.count("correct")


def test_every_exercise_has_a_stub_a_solution_and_a_wrong_answer():
    solved = {name for path in SOLUTIONS for name in functions(path.read_text(encoding="utf-8"))}
    notebooks = [nbformat.read(path, as_version=4) for path in reproduce.FOLDER.glob("0*.ipynb")]
    cells = [cell.source for notebook in notebooks for cell in notebook.cells if cell.cell_type == "code"]
    stubs = {name for cell in cells for name, stub in functions(cell).items() if stub.endswith("return None")}
    assert stubs == solved == WRONG.keys()


def test_two_draws_are_of_one_model():
    """Exercise 2 of notebook 07."""
    notebook = nbformat.read(reproduce.FOLDER / reproduce.COMPARISON, as_version=4)
    cell, = [cell for cell in notebook.cells if cell.cell_type == "code" and "def changed(" in cell.source]
    lists = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr == "lists"]
    assert len({ast.unparse(call.args[0]) for call in lists}) == 1 and "draw" in cell.source


def test_every_notebook_has_exercises_and_solutions_but_the_explorers():
    notebooks = [path.stem for path in sorted(reproduce.FOLDER.glob("0*.ipynb")) if path.name != reproduce.EXPLORERS]
    assert [path.stem for path in SOLUTIONS] == notebooks
