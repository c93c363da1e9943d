"""Every notebook keeps the house rules: one parameters cell, short cells, and outputs fit to be read on the web."""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
LOCAL_PATH = re.compile(r"/(root|home|work|tmp|Users)/")
MAX_BYTES = 1_000_000
MAX_LINES, MAX_WIDTH = 30, 115

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def test_is_a_valid_small_notebook(path):
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert raw["nbformat"] == 4
    nbformat.validate(raw)
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < MAX_BYTES


def test_has_one_parameters_cell_of_typed_commented_literals(path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0].cell_type == "code"
    source = tagged[0].source
    statements = ast.parse(source).body
    assert statements
    commented = {
        token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for statement in statements:
        assert isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name), ast.unparse(statement)
        assert statement.value is not None, ast.unparse(statement)
        ast.literal_eval(statement.value)
        assert commented.intersection(range(statement.lineno, statement.end_lineno + 1)), ast.unparse(statement)


def test_no_injected_parameters(path):
    notebook = read(path)
    assert not [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert "papermill" not in notebook.metadata
    assert not [cell for cell in notebook.cells if "papermill" in cell.metadata]


def test_code_cells_are_short_and_parse(path):
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        assert max(map(len, cell.source.splitlines()), default=0) <= MAX_WIDTH, cell.source
        ast.parse(cell.source)


def test_outputs_come_from_one_clean_run(path):
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    if not outputs(path):
        assert all(cell.execution_count is None for cell in cells)
        return
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(path) if output.output_type == "error"]
    assert not [output.text for output in outputs(path) if output.get("name") == "stderr"]


def test_outputs_name_no_local_path(path):
    for output in outputs(path):
        # images are base64, where a slash means nothing
        data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
        text = json.dumps([output.get("text", ""), data, output.get("traceback", [])])
        assert not LOCAL_PATH.search(text), text[:500]
