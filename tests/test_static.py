"""What the code must not do: copy forwards, patch instances, import more than the Hub loads, grow without end."""

import ast
import inspect
import sys
import textwrap
from pathlib import Path

import pytest
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava, processing_llava
from transformers.models.mistral import modeling_mistral
from transformers.models.mixtral import modeling_mixtral
from transformers.models.phi import modeling_phi
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.stablelm import modeling_stablelm

ROOT = Path(__file__).parent.parent
ROOT_FILES = sorted(path for path in ROOT.glob("*.py") if path.name not in ("__init__.py", "cli.py"))
STOCK = (modeling_llama, modeling_llava, modeling_mistral, modeling_qwen2, processing_llava)
STOCK += (modeling_mixtral, modeling_phi, modeling_stablelm)
LONGEST_RUN = 5  # identical consecutive statement lines that are still a coincidence
MAX_LINES = 520


def functions(source):
    """Function name -> its statements as normalised lines, docstring and signature aside."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = [line.strip() for statement in body for line in ast.unparse(statement).splitlines()]
            found[f"{node.name}:{node.lineno}"] = lines
    return found


def longest_common_run(ours, theirs):
    """Number of consecutive equal lines two functions share at most."""
    best, ends = 0, [0] * (len(theirs) + 1)
    for line in ours:
        ends = [0] + [ends[place] + 1 if line == other else 0 for place, other in enumerate(theirs)]
        best = max(best, *ends)
    return best


def assigned_attributes(tree):
    """Every `x.name` that is assigned to, deleted, or set through `setattr` with a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.attr, node.lineno
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            yield getattr(node.args[1], "value", None), node.lineno


def imported_modules(tree):
    """(level, module) of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, name.name) for name in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module


@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.name)
def test_no_function_of_llava_or_its_decoders_is_copied(path):
    theirs = {}
    for module in STOCK:
        theirs |= {f"{module.__name__}.{name}": body for name, body in functions(inspect.getsource(module)).items()}
    for name, ours in functions(path.read_text()).items():
        for other, body in theirs.items():
            run = longest_common_run(ours, body)
            assert run <= LONGEST_RUN, f"{path.name}: {name} shares {run} consecutive lines with {other}"


def test_the_comparison_finds_a_copied_forward():
    ours = functions(textwrap.dedent(inspect.getsource(modeling_mistral.MistralDecoderLayer)))
    forward = next(body for name, body in ours.items() if name.startswith("forward"))
    theirs = functions(inspect.getsource(modeling_llama)).values()
    assert max(longest_common_run(forward, body) for body in theirs) > LONGEST_RUN


@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.name)
def test_no_method_is_patched_onto_an_instance_or_a_class(path):
    methods = {"forward", "__call__", "generate", "update", "prepare_inputs_for_generation"}
    for module in STOCK:
        methods |= {name.split(":")[0] for name in functions(inspect.getsource(module))}
    tree = ast.parse(path.read_text())
    patched = [(name, line) for name, line in assigned_attributes(tree) if name in methods]
    assert not patched, f"{path.name} assigns to {patched}"
    assert "types" not in {module for _, module in imported_modules(tree)}, "MethodType binds functions to instances"


def test_the_search_finds_a_patched_method():
    found = [name for name, _ in assigned_attributes(ast.parse("layer.forward = f\nsetattr(layer, 'update', f)"))]
    assert found == ["forward", "update"]


@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.name)
def test_a_root_file_imports_torch_transformers_and_siblings_only(path):
    # safetensors comes with Transformers.
    for level, module in imported_modules(ast.parse(path.read_text())):
        if level:
            assert level == 1 and module, f"{path.name}: the Hub loads `from .sibling import Name` only"
            assert (ROOT / f"{module}.py").exists(), f"{path.name} imports .{module}, which is no sibling file"
        else:
            top = module.split(".")[0]
            assert top in {"torch", "transformers", "safetensors"} or top in sys.stdlib_module_names, (
                f"{path.name} imports {module}"
            )


@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.name)
def test_no_docstring_line_of_a_root_file_reads_like_a_relative_import(path):
    # The Hub's loader scans the text of a file for them.
    tree = ast.parse(path.read_text())
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    lines = [line.strip() for string in strings for line in string.splitlines()]
    assert not [line for line in lines if line.startswith(("from .", "import ."))]


@pytest.mark.parametrize("name", ["modeling_roe_llava.py", "modeling_moe_llava.py"])
def test_the_modeling_file_stays_short(name):
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= MAX_LINES
