"""What the text of the repository never says, and what its code never does."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".jinja", ".css", ".cfg", ""}

NEVER = {
    "unfinished work": r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError",
    "a folder of one machine": r"(?<![\w.~-])/(home|Users|root|work)/(?!ada|me|user|you)\w",
    "a placeholder": r"\blorem ipsum\b",
}
VAGUE = {"utils", "util", "common", "misc", "helpers", "helper", "manager", "core"}
FOREIGN = re.compile(r"lora_down|lora_up|\bblk\.\d|ffn_gate\b")
DANGEROUS = {
    "pickle": "a pickle runs code when it is read",
    "dill": "a pickle runs code when it is read",
    "cloudpickle": "a pickle runs code when it is read",
    "marshal": "not safe to read",
    "shelve": "a pickle runs code when it is read",
}


def tracked() -> list[Path]:
    """The files of the repository; outside of git, all that is not built."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        found = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        found = [p for p in ROOT.rglob("*") if not {".venv", ".git"} & set(p.parts)]
    return sorted(p for p in found if p.is_file() and p.suffix in TEXT and p != Path(__file__))


def code() -> list[Path]:
    return sorted((ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize("what", NEVER)
def test_the_repository_never_says(what):
    found = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a binary file without a suffix
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(lines, 1)
            if re.search(NEVER[what], line)
        ]
    assert not found, f"{what}:\n" + "\n".join(found)


def test_no_file_has_a_vague_name():
    vague = [str(p.relative_to(ROOT)) for p in code() if VAGUE & {*p.parts, p.stem}]
    assert not vague, vague


def test_foreign_tensor_names_stop_at_files():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in code()
        if "files" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FOREIGN.search(line)
    ]
    assert not found, found


def _danger(node: ast.AST) -> str | None:
    """Why a piece of code must not be there."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        )
        return next((DANGEROUS[n] for n in names if n in DANGEROUS), None)
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "a bare except hides everything"
    if not isinstance(node, ast.Call):
        return None
    name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if name in ("eval", "exec", "os.system", "os.popen"):
        return f"{name} runs text as code"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True reads a pickle"
    if name in ("yaml.load", "yaml.full_load", "yaml.unsafe_load"):
        return f"{name} may build any object"
    if keywords.get("shell") == "True":
        return "a shell reads its arguments as instructions"
    return None


@pytest.mark.parametrize("path", code(), ids=lambda path: path.relative_to(ROOT / "src").as_posix())
def test_the_code_never_does(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [f"line {node.lineno}: {why}" for node in ast.walk(tree) if (why := _danger(node))]
    assert not found, found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "yaml.load(t, Loader=L)",
        "subprocess.run(c, shell=True)",
        "try:\n    f()\nexcept:\n    pass",
        "eval(t)",
    ],
)
def test_dangers_would_be_seen(text):
    assert any(_danger(node) for node in ast.walk(ast.parse(text)))
