"""Rules of the house that no linter knows: what tests may use, and where families of base models differ."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A private name; in a string with its module, too, as `setattr` takes it.
_PRIVATE = re.compile(r"(?:[\w.]+\.)?(_[a-zA-Z]\w*)")


def private_names(source: str) -> tuple[set[str], set[str]]:
    """Those that a module defines, and those that it imports, reads of any object, or may patch."""
    defined, used = set[str](), set[str]()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(attr=name):
                (defined if isinstance(node.ctx, ast.Store) and _is_self(node.value) else used).add(name)
            case ast.alias(name=name) | ast.Constant(value=str(name)) if found := _PRIVATE.fullmatch(name):
                used.add(found[1])
    return {each for each in defined if _PRIVATE.fullmatch(each)}, used


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def test_private_names_of_another_module_are_neither_imported_nor_patched() -> None:
    names = {
        path.relative_to(ROOT): private_names(path.read_text("utf-8"))
        for folder in ("src", "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    ours = set().union(*(defined for defined, _ in names.values()))
    outside = {path: both for path, both in names.items() if path.parts[0] != "src"}
    assert {str(path): found for path, (own, used) in outside.items() if (found := (used & ours) - own)} == {}


def test_an_import_a_read_and_a_patch_of_a_private_name_are_found() -> None:
    source = 'from a import _b\nx._c\nx._d = 1\nsetattr(x, "_e", 1)\nsetattr("a.F._g", 1)\nself._h = _i = 1\n"_j or k"'
    assert private_names(source) == ({"_h", "_i"}, {"_b", "_c", "_d", "_e", "_g"})


def test_families_of_base_models_are_distinguished_in_one_place() -> None:
    compared = re.compile(r"model_type\)* (==|!=|in|not in) ")
    places = {path.name for path in (ROOT / "src").rglob("*.py") if compared.search(path.read_text("utf-8"))}
    assert places == {"families.py", "datamodule.py"}, "which asks whether a family packs"
