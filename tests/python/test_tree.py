"""The rules of the source tree: who may include or import whom, names, sizes, and what is not to be in the code.

Each rule is a function from text (or paths) to a list of findings, checked on the tree and on a planted fault.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP_SUFFIXES = {".h", ".cpp", ".inc"}
SKIPPED_FOLDERS = {"build", "dist", ".venv", ".git", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache"}


def tree_files(*folders: str) -> list[Path]:
    """Source files below the named folders, or of the whole tree; sorted."""
    starts = [ROOT / folder for folder in folders] or [ROOT]
    found = []
    for start in starts:
        for path in [start] if start.is_file() else start.rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and not SKIPPED_FOLDERS.intersection(parts) and not parts[0].endswith(".egg-info"):
                found.append(path)
    return sorted(found)


def cpp_files(*folders: str) -> list[Path]:
    return [path for path in tree_files(*(folders or ("csrc",))) if path.suffix in CPP_SUFFIXES]


def python_files(*folders: str) -> list[Path]:
    return [path for path in tree_files(*(folders or ("kt_kernel", "scripts"))) if path.suffix == ".py"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def cpp_code(text: str) -> str:
    """C++ text with comments and the contents of string and character literals blanked; lines keep their numbers."""
    pattern = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'", re.DOTALL)

    def blank(match: re.Match[str]) -> str:
        token = match.group(0)
        newlines = "\n" * token.count("\n")
        return newlines if token.startswith("/") else token[0] + newlines + token[-1]

    # 1'000'000 would look like a character literal
    return pattern.sub(blank, re.sub(r"(?<=[0-9a-fA-F])'(?=[0-9a-fA-F])", "", text))


def include_lines(text: str) -> Iterator[tuple[int, str]]:
    """Line number and target, with its quotes or brackets, of each #include."""
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"\s*#\s*include\s*([<\"][^>\"]+[>\"])", line)
        if match:
            yield number, match.group(1)


# Layers of csrc.

KERNEL_API = ("kernels/kernel.h", "kernels/registry.h", "kernels/tiles.h")
# What files of a folder may include besides their own folder and the standard library, as prefixes of include paths.
LAYERS: dict[str, tuple[str, ...]] = {
    "base": (),
    "system": ("base/",),
    "format": ("base/",),
    "kernels": ("base/",),
    "runtime": ("base/",),
    "moe": ("base/", "system/", "format/", *KERNEL_API),
    "engine": ("base/", "system/", "format/", "runtime/", "moe/", *KERNEL_API),
    "torch": ("base/", "system/", "format/", "runtime/", "moe/", "engine/", *KERNEL_API),
    "python": ("base/", "system/", "format/", "runtime/", "moe/", "engine/", *KERNEL_API),
}
FRAMEWORK_HEADERS = re.compile(r"[<\"](torch|ATen|c10|caffe2|pybind11|Python\.h|cuda|nccl)")
FRAMEWORKS_OF = {"torch": ("torch/", "ATen/", "c10/"), "python": ("pybind11/",)}
ISA_HEADERS = {"<immintrin.h>", "<cstddef>", "<cstdint>", "<cstring>"}


def include_findings(path: str, text: str) -> list[str]:
    """Includes of a file (path relative to csrc/) that its layer does not allow."""
    folder = path.split("/")[0]
    if folder not in LAYERS:
        return [f"{path}: folder {folder} has no place in the layers; add it to LAYERS"]
    findings = []
    for number, target in include_lines(text):
        name = target[1:-1]
        if path.startswith("kernels/x86/"):
            own = name in ("kernels/kernel.h", "kernels/kernels.inc") or name.startswith(("kernels/x86/", "x86/"))
            if not own and target not in ISA_HEADERS:
                findings.append(f"{path}:{number}: ISA objects may not include {target}")
            continue
        if FRAMEWORK_HEADERS.match(target) and not (target[0] == '"' and name.startswith(f"{folder}/")):
            if not name.startswith(FRAMEWORKS_OF.get(folder, ("-",))):
                findings.append(f"{path}:{number}: {target} belongs to another layer")
        elif target[0] == '"' and not name.startswith((f"{folder}/", *LAYERS[folder])):
            findings.append(f"{path}:{number}: {folder}/ may not include {target}")
    return findings


def test_includes_follow_the_layers() -> None:
    findings = []
    for path in cpp_files():
        findings += include_findings(path.relative_to(ROOT / "csrc").as_posix(), path.read_text())
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("base/span.h", '#include "system/topology.h"'),
        ("kernels/registry.cpp", '#include "system/worker_pool.h"'),
        ("kernels/x86/gemm.cpp", "#include <vector>"),
        ("kernels/x86/gemm.cpp", '#include "base/span.h"'),
        ("runtime/cpu_stream.cpp", '#include "system/topology.h"'),
        ("moe/routing.cpp", "#include <ATen/ATen.h>"),
        ("moe/routing.cpp", '#include "kernels/x86/rowwise.h"'),
        ("torch/ops.cpp", "#include <cuda_runtime.h>"),
        ("extra/new.h", ""),
    ],
)
def test_a_wrong_include_is_found(path: str, line: str) -> None:
    assert include_findings(path, line)


def test_kernel_contract_has_no_inline_function() -> None:
    text = (ROOT / "csrc/kernels/kernel.h").read_text()
    assert [target for _, target in include_lines(text)] == ["<cstdint>"]
    assert not re.search(r"\binline\b|\btemplate\b", cpp_code(text)), "ISA objects would emit it"
    assert not function_lengths(cpp_code(text)), "kernel.h may only declare"


def test_cuda_is_named_in_its_files_only() -> None:
    findings = [
        relative(path)
        for path in cpp_files()
        if not relative(path).startswith("csrc/runtime/cuda_")
        and re.search("cuda", cpp_code(path.read_text()), re.IGNORECASE)
    ]
    assert not findings, f"only csrc/runtime/cuda_* may name CUDA in code: {findings}"


# Imports of Python.


def imported_modules(text: str) -> set[str]:
    """Top-level names of all modules a file imports, at any depth."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module.split(".")[0])
    return modules


IMPORT_RULES = {
    "sglang": ("kt_kernel/integrations/", "kt_kernel/launch_server.py", "scripts/"),
    "transformers": ("kt_kernel/integrations/", "kt_kernel/launch_server.py", "kt_kernel/demo.py", "scripts/"),
}


@pytest.mark.parametrize("module", IMPORT_RULES)
def test_frameworks_are_imported_in_their_folder_only(module: str) -> None:
    findings = [
        relative(path)
        for path in python_files("kt_kernel", "scripts")
        if module in imported_modules(path.read_text()) and not relative(path).startswith(IMPORT_RULES[module])
    ]
    assert not findings, f"{module} may be imported under {IMPORT_RULES[module]} only: {findings}"


def test_imports_are_seen_inside_functions() -> None:
    assert imported_modules("def f():\n    from sglang.srt import x\n") == {"sglang"}


# Modules of kt_kernel from the bottom up: each may import from rows above its own only, at any depth of its code.
PYTHON_LAYERS = (
    ("_ext", "_build_info", "activations", "methods"),
    ("config", "deferral", "device_experts", "files", "progress", "proxy"),
    ("ops", "checkpoint", "device_stream", "environment", "packed_folder", "placement"),
    ("experts", "layer_chain", "packed_writer", "wrapper_checks"),
    ("checkpoint_source",),
    ("loader", "converter", "expert_export"),
    ("wrapper", "collect_env", "convert_command", "bench"),
    ("hybrid_moe",),
    ("integrations",),
    ("demo", "launch_server"),
)
PYTHON_RANK = {module: rank for rank, modules in enumerate(PYTHON_LAYERS) for module in modules}


def imported_layers(text: str) -> set[str]:
    """Modules of PYTHON_LAYERS that a file of kt_kernel imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kt_kernel":
            parts = node.module.split(".")[1:]
            found.update(parts[:1] or (alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("kt_kernel."))
    return found - {"__version__"}


def layer_findings(module: str, text: str) -> list[str]:
    if module not in PYTHON_RANK:
        return [f"kt_kernel/{module} has no place in PYTHON_LAYERS"]
    wrong = [name for name in imported_layers(text) if PYTHON_RANK.get(name, 99) >= PYTHON_RANK[module]]
    return [f"{module} may not import {name}" for name in sorted(wrong) if name != module]


def test_python_modules_follow_the_layers() -> None:
    findings = []
    for path in python_files("kt_kernel"):
        module = path.relative_to(ROOT / "kt_kernel").parts[0].removesuffix(".py")
        if module != "__init__":
            findings += layer_findings(module, path.read_text())
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("experts", "from kt_kernel.wrapper import KTMoEWrapper"),
        ("loader", "def f():\n    from kt_kernel import converter"),
        ("wrapper", "import kt_kernel.integrations.sglang"),
        ("config", "from kt_kernel import KTMoEWrapper"),
        ("extra", ""),
    ],
)
def test_a_wrong_import_is_found(module: str, line: str) -> None:
    assert layer_findings(module, line)


# Names.

MODEL_NAMES = re.compile(r"qwen|deepseek|mixtral|llama(?!file)|kimi|\bglm|minimax|smollm|mistral", re.IGNORECASE)
MODEL_NAME_FILES = ("kt_kernel/checkpoint/names.py", "kt_kernel/demo.py", "kt_kernel/integrations/", "kt_kernel/bench/")


def test_model_names_stay_in_their_files() -> None:
    findings = []
    for path in [*cpp_files(), *python_files("kt_kernel")]:
        if relative(path).startswith(MODEL_NAME_FILES):
            continue
        # a C++ comment may say for which model's sizes a constant was chosen
        text = path.read_text() if path.suffix == ".py" else cpp_code(path.read_text())
        for number, line in enumerate(text.splitlines(), 1):
            if MODEL_NAMES.search(line):
                findings.append(f"{relative(path)}:{number}: {line.strip()}")
    assert not findings, "\n".join(findings)


FORBIDDEN_NAME = re.compile(r"(^|_)(utils?|common|helpers?|misc|v2|new|tmp|data2)(_|$)")


def test_file_names_say_what_is_inside() -> None:
    findings = [
        relative(path)
        for path in tree_files("csrc", "kt_kernel", "scripts", "tests")
        if FORBIDDEN_NAME.search(path.stem) and path.stem != "test_util"
    ]
    findings += [relative(path) for path in cpp_files("csrc", "tests") if not re.fullmatch(r"[a-z0-9_]+", path.stem)]
    assert not findings, findings


def test_a_forbidden_name_is_found() -> None:
    assert all(FORBIDDEN_NAME.search(name) for name in ("utils", "kernel_utils", "common", "moe_v2"))
    assert not any(FORBIDDEN_NAME.search(name) for name in ("renewal", "commonly", "kernel", "test_newest"))


# Sizes.


def source_files() -> list[Path]:
    suffixes = CPP_SUFFIXES | {".py", ".sh", ".cmake"}
    return [path for path in tree_files() if path.suffix in suffixes or path.name == "CMakeLists.txt"]


def test_files_are_short() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in source_files()}
    long = {name: lines for name, lines in lengths.items() if lines > 800}
    assert not long, f"files over 800 lines: {long}"
    ninetieth = sorted(lengths.values())[int(0.9 * (len(lengths) - 1))]
    assert ninetieth <= 500, f"the 90th percentile of file lengths is {ninetieth}, above 500"


CONTROL = re.compile(r"\b(if|for|while|switch|catch|do|else|try)\b[^;{}]*$")
SCOPE = re.compile(r"\b(namespace|class|struct|union|enum|extern)\b[^;{}()]*$")


def function_lengths(code: str) -> list[tuple[int, int]]:
    """(first line, number of lines) of each outermost function body in blanked C++ text."""
    code = re.sub(r"(?m)^[ \t]*#.*(?:\\\n.*)*$", lambda match: "\n" * match.group(0).count("\n"), code)
    lengths = []
    stack: list[str] = []
    start_line = 0
    head_start = 0
    for match in re.finditer(r"[{};]", code):
        head = code[head_start : match.start()]
        if match.group(0) == "{":
            inside = "function" in stack
            # a default argument or member initialiser in braces stays part of the head
            is_function = not inside and "(" in head and not SCOPE.search(head) and not CONTROL.search(head.strip())
            is_function = is_function and not head.rstrip().endswith(("=", ",", "("))
            stack.append("function" if is_function else "block")
            if is_function:
                start_line = code.count("\n", 0, head_start + len(head) - len(head.lstrip())) + 1
        elif match.group(0) == "}" and stack and stack.pop() == "function":
            lengths.append((start_line, code.count("\n", 0, match.end()) + 1 - start_line + 1))
        head_start = match.end()
    return lengths


def test_functions_are_short() -> None:
    findings = []
    for path in cpp_files():
        for line, length in function_lengths(cpp_code(path.read_text())):
            if length > 100:
                findings.append(f"{relative(path)}:{line}: {length} lines")
    for path in python_files("kt_kernel", "scripts"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                if length > 100:
                    findings.append(f"{relative(path)}:{node.lineno}: {node.name} has {length} lines")
    assert not findings, "functions over 100 lines:\n" + "\n".join(findings)


def test_a_long_function_is_measured() -> None:
    body = "  if (x) {\n    y();\n  }\n" * 40
    text = f"namespace kt {{\nclass A {{\n  int n = 0;\n}};\nvoid f(int x) {{\n{body}}}\n}}\n"
    assert function_lengths(text) == [(5, 122)]


# What is not to be in the code.


def test_sources_are_ascii() -> None:
    findings = []
    for path in [*source_files(), *tree_files("install.sh", ".ci")]:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.isascii():
                findings.append(f"{relative(path)}:{number}")
    assert not findings, f"not ASCII: {findings}"


PRINTS = re.compile(
    r"\b(printf|fprintf|puts|fputs|putchar|perror|abort|_Exit|quick_exit|signal|sigaction|assert)\s*\("
    r"|\bstd::(cout|cerr|clog|terminate|exit)\b|(?<![\w.>:])exit\s*\("
)


def test_library_neither_prints_nor_aborts() -> None:
    findings = []
    for path in cpp_files():
        for number, line in enumerate(cpp_code(path.read_text()).splitlines(), 1):
            if PRINTS.search(line):
                findings.append(f"{relative(path)}:{number}: {line.strip()}")
    assert not findings, "\n".join(findings)


def test_a_print_is_found() -> None:
    assert PRINTS.search('printf("x");') and PRINTS.search("std::cout << 1") and PRINTS.search("assert(x)")
    assert not PRINTS.search("static_assert(x)") and not PRINTS.search("snprintf(b, 1, f)")
    assert not PRINTS.search(cpp_code('// printf("x")\nf("abort()");'))


CPP_STATEMENT = re.compile(
    r"^\s*// ?(?! )("
    r"(\w[\w:<>*&\[\].-]* )?[\w:<>*&\[\].-]+ ?[-+*/|&^]?= ?[^=].*;"  # at most a type and a name, then =
    r"|[\w:.>-]+\(.*\);"
    r"|(if|for|while|switch) ?\(.*[{;]|(return|else)\b.*;|\}"
    r"|# ?(include|define|if|endif)\b.*"
    r")$"
)


def commented_out_cpp(text: str) -> list[int]:
    """Lines of // comments that read as a statement. Code shown in a header comment is indented by two or more."""
    return [number for number, line in enumerate(text.splitlines(), 1) if CPP_STATEMENT.match(line)]


def commented_out_python(text: str) -> list[int]:
    """Lines whose comment parses as an assignment, a call, an import or another statement."""
    lines = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or token.string.startswith("#!"):
            continue
        comment = token.string.lstrip("# ").rstrip()
        try:
            body = ast.parse(comment).body
        except (SyntaxError, ValueError):
            continue
        kept = ast.Assign | ast.AugAssign | ast.Import | ast.ImportFrom | ast.Return | ast.Delete | ast.Raise | ast.Call
        statements = [node.value if isinstance(node, ast.Expr) else node for node in body]
        if any(isinstance(node, kept) for node in statements):
            lines.append(token.start[0])
    return lines


def test_no_code_is_commented_out() -> None:
    findings = []
    for path in cpp_files("csrc", "tests"):
        findings += [f"{relative(path)}:{line}" for line in commented_out_cpp(path.read_text())]
    for path in python_files("kt_kernel", "scripts", "tests"):
        findings += [f"{relative(path)}:{line}" for line in commented_out_python(path.read_text())]
    assert not findings, f"commented-out code: {findings}"


def test_commented_out_code_is_found() -> None:
    assert commented_out_cpp("// x = f(y);\n  // if (x) {\n//#include <a>\n") == [1, 2, 3]
    assert commented_out_cpp("// The sum of a and b; it is exact.\n//   KT_CHECK(k > 0, k);\n") == []
    assert commented_out_python("x = 1  # y = f(x)\n# import os\n# a sentence about f(x).\n# [n, k] int8\n") == [1, 2]


def test_no_notes_to_self() -> None:
    pattern = re.compile(r"\b(" + "|".join(("TODO", "FIXME", "XXX", "HACK")) + r")\b")
    findings = []
    for path in source_files():
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if pattern.search(line):
                findings.append(f"{relative(path)}:{number}")
    assert not findings, findings


def test_documents_named_in_the_code_are_in_the_tree() -> None:
    findings = []
    for path in source_files():
        for name in re.findall(r"\b[\w/-]+\.md\b", path.read_text()):
            if not any((folder / name).exists() for folder in (ROOT, ROOT / "docs")):
                findings.append(f"{relative(path)}: {name}")
    assert not findings, findings


# README.


def read_variables(path: Path) -> set[str]:
    """KT_* environment variables a file reads."""
    text = path.read_text()
    if path.suffix in CPP_SUFFIXES:
        return set(re.findall(r"getenv\s*\(\s*\"(KT_[A-Z0-9_]+)\"", text)) | set(
            re.findall(r"k\w*(?:Variable|Env)\w*(?:\[\])?\s*=\s*\"(KT_[A-Z0-9_]+)\"", text)
        )
    if path.suffix == ".py":
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        return {value for value in strings if isinstance(value, str) and re.fullmatch(r"KT_[A-Z0-9_]*[A-Z0-9]", value)}
    return set(re.findall(r"\$\{(KT_[A-Z0-9_]+):", text))


def section_of(page: str, marker: str) -> str:
    """The text between ``<!-- marker:begin -->`` and ``<!-- marker:end -->`` of a page."""
    match = re.search(rf"<!-- {marker}:begin -->(.*?)<!-- {marker}:end -->", (ROOT / page).read_text(), re.DOTALL)
    assert match, f"{page} has no section {marker}"
    return match.group(1)


def test_every_variable_is_in_the_readme() -> None:
    files = [*cpp_files(), *python_files("kt_kernel", "scripts", "setup.py"), *tree_files("install.sh")]
    files += [path for path in tree_files("scripts") if path.suffix == ".sh"]
    used = set().union(*(read_variables(path) for path in files))
    listed = set(re.findall(r"^\| `(KT_[A-Z0-9_]+)`", section_of("README.md", "environment"), re.MULTILINE))
    assert not used - listed, f"read, but not in the README (kt_kernel/config.py ENVIRONMENT): {sorted(used - listed)}"
    assert not listed - used, f"in the README, but read nowhere: {sorted(listed - used)}"


def kernel_rows() -> dict[str, str]:
    """Name and features of every row of kernels.inc."""
    text = cpp_code((ROOT / "csrc/kernels/kernels.inc").read_text())
    text = re.sub(r"(?m)^#.*$", "", text)
    return dict(re.findall(r"\bKT_[A-Z_]+\(\s*(\w+)\s*,(?:\s*gemm_\w+\s*,)?\s*([\w\s|]+?)\s*[,)]", text))


def test_every_kernel_is_in_the_documents() -> None:
    section = section_of("docs/kernels.md", "kernels")
    rows = kernel_rows()
    assert len(rows) >= 5, "kernels.inc was not understood"
    missing = [symbol for symbol in rows if f"`{symbol}`" not in section]
    assert not missing, f"run scripts/generate_readme_tables.py; not in docs/kernels.md: {missing}"


def test_kernel_symbols_follow_the_grammar() -> None:
    isa = "reference|avx2|avx512|avx512vnni|avx512bf16|avx512vbmi|avxvnni|amxint8|amxbf16"
    table = (ROOT / "csrc/base/weight_format.cpp").read_text()
    weights = "|".join(re.findall(r'\{F::\w+, "(\w+)"', table))
    gemm = rf"gemm_(s8|u8|bf16)_({weights})[xb]?_fp32_\d+x\d+x\d+_({isa})"
    rows = rf"expand_({weights})(_bf16)?|pack_(int8|bf16|int8_bf16)|tiles"
    other = rf"({rows}|rowwise|read_probe|peak_probe_(int8|int4|bf16))_({isa})"
    wrong = [name for name in kernel_rows() if not re.fullmatch(rf"{gemm}|{other}", name)]
    assert not wrong, f"symbols outside the grammar above kernels.inc: {wrong}"
