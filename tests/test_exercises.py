"""Every exercise says "not attempted" as it stands, accepts the solution in notebooks/solutions and mends a wrong one."""

import ast
import re
import shutil
import textwrap

import nbformat
import papermill
import pytest

from flowerlib import reproduce

WRONG = {  # an answer to each exercise that a reader may well give
    "flow_of_star": "return 31 + 9 + 11, 51 / 119",
    "tamed_alpha": "return 0.5",
    "trajectory_balance": "return (log_pi - log_r).sum(-1).square().mean()",
    "draw_list": "return np.argsort(-p)[:k]",
    "most_popular": "return popular[:10]",
    "gini_by_hand": "return np.abs(x - x.mean()).mean() / x.mean()",
    "bits_of_the_title": "return -log_pf.sum().item()",
    "share_of_decisions": "return (children > 1).float().mean()",
    "all_different": "return 1.0",
    "balanced_as_a_whole": "return log_r.clone()",
    "hit_rate_on_the_tail": "return 2.0",
    "fair_and_useless": "return np.tile(np.argsort(-counts)[:k], (n_users, 1))",
    "ghosts_needed": "return 2",
    "node_share": "return reach * float((pi * np.log(pi / r)).sum())",
    "mended_reward": "return log_target",
    "titles_for_half": "return len(slots) // 2",
    "fair_with_few": "return counts",
    "undominated": "return {(row['method'], row.get('reward')) for row in rows_of}",
    "changed": "return np.mean(one != other) * one.shape[1]",
    "packed_over_rows": "return 1 / n",
    "tree_over_rows": "return trie.n_nodes / sum(lengths)",
}
SOLUTIONS = sorted((reproduce.FOLDER / "solutions").glob("*.py"))


def functions(source):
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef)}


def text(notebook):
    return [out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.get("name") == "stdout"]


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_pass_and_wrong_answers_are_told_why(path, smoke, tmp_path):
    run = shutil.copytree(smoke, tmp_path / "run")
    solutions = functions(path.read_text(encoding="utf-8"))
    notebook = nbformat.read(reproduce.FOLDER / f"{path.stem}.ipynb", as_version=4)
    cells, left = [], dict(solutions)
    for cell in notebook.cells:
        stubs = functions(cell.source) if cell.cell_type == "code" else {}
        for name, stub in stubs.items():
            if stub.endswith("return None") and name in left:
                wrong = cell.source.replace(stub, stub.replace("return None", WRONG[name]))
                told = f"try:\n{textwrap.indent(wrong, '    ')}\nexcept AssertionError as error:\n    print('told:', error)"
                cells.append(nbformat.v4.new_code_cell(told))
                cell.source = cell.source.replace(stub, left.pop(name))
        cells.append(cell)
    notebook.cells = cells
    assert not left, "the notebook has no such exercise"
    solved = tmp_path / f"{path.stem}.ipynb"
    nbformat.write(notebook, solved)
    given = {"PROFILE": "smoke", "OUT": str(run)}
    done = papermill.execute_notebook(solved, tmp_path / "done.ipynb", given, cwd=reproduce.FOLDER, progress_bar=False)
    said = "".join(text(done))
    assert "not attempted" not in said and said.count("correct") == len(solutions)
    assert len(re.findall("^told: .{10}", said, re.MULTILINE)) == len(solutions)
    if path.stem != "00_follow_the_flow":
        as_it_stands = nbformat.read(run / "notebooks" / f"{path.stem}.ipynb", as_version=4)
        assert "".join(text(as_it_stands)).count("not attempted") == said.count("correct")


def test_every_notebook_has_exercises_and_solutions_but_the_explorers():
    notebooks = [path.stem for path in sorted(reproduce.FOLDER.glob("0*.ipynb")) if path.name != reproduce.EXPLORERS]
    assert [path.stem for path in SOLUTIONS] == notebooks
