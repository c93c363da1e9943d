"""Every exercise says "not attempted" as it stands and accepts the solution in notebooks/solutions."""

import ast
import shutil

import nbformat
import papermill
import pytest

from flowerlib import reproduce

SOLUTIONS = sorted((reproduce.FOLDER / "solutions").glob("*.py"))


def functions(source):
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef)}


def text(notebook):
    return [out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.get("name") == "stdout"]


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_pass_their_checkers(path, smoke, tmp_path):
    run = shutil.copytree(smoke, tmp_path / "run")
    solutions = functions(path.read_text(encoding="utf-8"))
    notebook = nbformat.read(reproduce.FOLDER / f"{path.stem}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for name, stub in functions(cell.source).items():
                if stub.endswith("return None") and name in solutions:
                    cell.source = cell.source.replace(stub, solutions.pop(name))
    assert not solutions, "the notebook has no such exercise"
    solved = tmp_path / f"{path.stem}.ipynb"
    nbformat.write(notebook, solved)
    given = {"PROFILE": "smoke", "OUT": str(run)}
    done = papermill.execute_notebook(solved, tmp_path / "done.ipynb", given, cwd=reproduce.FOLDER, progress_bar=False)
    said = "".join(text(done))
    assert "not attempted" not in said and said.count("correct") == len(functions(path.read_text(encoding="utf-8")))
    if path.stem != "00_follow_the_flow":
        as_it_stands = nbformat.read(run / "notebooks" / f"{path.stem}.ipynb", as_version=4)
        assert "".join(text(as_it_stands)).count("not attempted") == said.count("correct")


def test_every_notebook_has_exercises_and_solutions_but_the_explorers():
    notebooks = [path.stem for path in sorted(reproduce.FOLDER.glob("0*.ipynb")) if path.name != reproduce.EXPLORERS]
    assert [path.stem for path in SOLUTIONS] == notebooks
