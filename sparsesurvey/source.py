"""A hash of measured code, so that a row whose code has changed since is seen to be stale.

The hash covers the named modules and every ``sparsesurvey`` module that they import, here or inside a function, unless
it is for type checkers alone (``if TYPE_CHECKING``), but not their prose: comments, docstrings and blank lines do not
count. It is made of text and of positions in the text,
so every Python version finds the same one. Imports by name at run time (``importlib``) are not followed: this keeps
one structure's hash free of the others, which the package ``sparsesurvey.structures`` finds in that way.
"""

import ast
import hashlib
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parent
CUDA = re.compile(r'"([\w-]+\.cuh?)"')
SOURCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(,[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)*")


def code_of(source: str, package: Path = PACKAGE, device: str = "cpu") -> str:
    """12 hex digits for the code of ``source``: dotted modules, comma separated, and what they import of ours.

    >>> code_of("sparsesurvey.structure") == code_of("sparsesurvey.structure")
    True

    ``package`` is the folder of the package whose imports are followed. What was measured on a CPU never ran the GPU's
    code (``kernels``), which then does not count; of a GPU's kernels the CUDA sources that a module names count as they
    are. ValueError names a module that has no file.
    """
    if not isinstance(source, str) or not SOURCE.fullmatch(source):
        raise ValueError(f"source must be dotted modules, comma separated and without spaces, got {source!r}")
    texts: dict[str, str] = {}
    waiting = source.split(",")
    while waiting:
        module = waiting.pop()
        if module not in texts:
            path = _file(module, package)
            stat = path.stat()
            texts[module], imports = _read(path, module, package, stat.st_mtime_ns, stat.st_size)
            if module.startswith(f"{package.name}.kernels"):
                texts |= {f"{module} {name}": text for name, text in _device_code(path.parent, texts[module])}
            waiting += [name for name in imports if device != "cpu" or not name.startswith(f"{package.name}.kernels")]
    digest = hashlib.sha256()
    for module in sorted(texts):
        digest.update(f"{module}\n{texts[module]}\n".encode())
    return digest.hexdigest()[:12]


def _device_code(folder: Path, text: str) -> Iterator[tuple[str, str]]:
    """Name and content of the CUDA sources beside a module that its code names."""
    for name in sorted(set(CUDA.findall(text))):
        if (folder / name).is_file():
            yield name, (folder / name).read_text(encoding="utf-8")


def code_text(text: str) -> str:
    """Python source without comments, docstrings, other bare strings, blank lines and trailing spaces.

    >>> print(code_text('def f(x):\\n    "doc"\\n\\n    return x  # why\\n'))
    def f(x):
        return x
    """
    lines = text.split("\n")
    inside = set()  # numbers, from 1, of the lines whose end belongs to a string
    cuts = []  # (line, column, line, column) of what is no code, columns in characters
    starts = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT":
            cuts.append((*token.start, *token.end))
        elif kind == "STRING":
            inside.update(range(token.start[0], token.end[0]))
        elif kind in ("FSTRING_START", "TSTRING_START"):  # from Python 3.12; a plain STRING before
            starts.append(token.start[0])
        elif kind in ("FSTRING_END", "TSTRING_END"):
            inside.update(range(starts.pop(), token.end[0]))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            cuts.append((*_place(lines, node.lineno, node.col_offset),
                         *_place(lines, node.end_lineno, node.end_col_offset)))
            inside.difference_update(range(node.lineno, node.end_lineno))
    for row, column, last, end in sorted(cuts, reverse=True):  # from the end, so that earlier places stay right
        tail = lines[last - 1][end:]
        lines[row - 1] = lines[row - 1][:column]
        lines[row:last] = [""] * (last - row)
        lines[last - 1] += tail
    return "\n".join(line if number in inside else line.rstrip()
                     for number, line in enumerate(lines, start=1) if number in inside or line.strip())


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers see."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        typing = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        waiting += node.orelse if typing else ast.iter_child_nodes(node)


def _place(lines: list[str], row: int, offset: int) -> tuple[int, int]:
    """``ast`` counts columns in UTF-8 bytes; here they are characters."""
    return row, len(lines[row - 1].encode()[:offset].decode())


def _file(module: str, package: Path) -> Path:
    """The file of a dotted module: below ``package``, or wherever Python finds a module that is not ours."""
    root, *parts = module.split(".")
    if root == package.name:
        found = _ours(package, parts)
        if found is None:
            raise ValueError(f"source names {module}, but the package {root} has no such module")
        return found
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ValueError(f"source names {module}, which has no Python file: measured code must live in a file")
    return Path(spec.origin)


def _ours(package: Path, parts: list[str]) -> Path | None:
    path = package.joinpath(*parts)
    candidates = (path / "__init__.py", path.with_suffix(".py")) if parts else (path / "__init__.py",)
    return next((file for file in candidates if file.is_file()), None)


@lru_cache(maxsize=1024)
def _read(path: Path, module: str, package: Path, mtime: int, size: int) -> tuple[str, tuple[str, ...]]:
    """The code of one file and the modules of ``package`` that it imports; read again when its time or size changes."""
    text = path.read_text(encoding="utf-8")
    home = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in _running(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[:len(home) + 1 - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            # "from package import name": the submodule of that name where there is one, else the package itself
            for alias in node.names:
                whole = [*base, alias.name]
                submodule = whole[0] == package.name and _ours(package, whole[1:])
                found.add(".".join(whole if submodule else base))
    ours = tuple(sorted(name for name in found if name.split(".")[0] == package.name and name != module))
    return code_text(text), ours
