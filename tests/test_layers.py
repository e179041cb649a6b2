"""Imports point down only, and importing the package is light. The table is the architecture."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "freqkv_jax"

# Lowest first. A module may import from lower layers and, in its own layer, from lines above its
# own. A line is a pattern of module names below freqkv_jax; modules of one line are strangers to
# each other, except where it says "together".
LAYERS = {
    "L0": [
        "config",
        "rope",
        "folding",
        "spectral",
        "sharding",
        "nvidia",
        "compile_options",
        "files",
        "token_ids",
        "hlo_text",
        "hlo",
    ],
    "L1": [
        "kv.policy",
        "kv.state",
        "kv.linear",
        "kv.folding_cuda",
        "kv.folding_cuda_back",
        "kv.folded_rounds",
        "kv.choosing_cuda",
        "kv.novelty_cuda",
        "kv.choosing",
        "kv.scored",
        "kv.freqkv",
        "kv.novelty",
        "kv.*",
        "kv",
    ],
    "L2": [
        "model.cudnn",
        "model.attention",
        "model.layers",
        "model.flash_decode",
        "model.self_attention",
        "model.scan",
        "model.matvec",
        "model.fused",
        "model.llama",
        "model.*",
        "model",
        "sources",
        "tokenizer.* together",
        "tokenizer",
        "weights.* together",
        "weights",
    ],
    "L3": [
        "sampling",
        "programs",
        "reading",
        "decode",
        "score",
        "generate",
        "state_file",
        "evals.* together",
        "evals",
        "compile_check",
        "compile_work",
        "training.* together",
        "training",
        "bench.* together",
        "bench",
        "demo together",
        "readme",
        "cli.* together",
        "cli",
        "__main__",
    ],
}
LINEN = ("model.layers", "model.self_attention", "model.llama")
NEVER = {"torch", "transformers"}  # the tests' and the evaluation tasks' business
MAY_USE_TRANSFORMERS = ("evals.*",)
MEASURES_TORCH = "bench.peers"  # run in a process of its own, where both are installed
# What `import freqkv_jax` must not load: an extra's package, or slow and not needed to compute.
HEAVY = [
    "torch", "transformers", "matplotlib", "gguf", "jinja2", "huggingface_hub", "tokenizers",
    "datasets", "scipy",
]  # fmt: skip


def module_names() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; "" is the package itself."""
    names = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        names[".".join(p for p in parts if p != "__init__")] = path
    return names


MODULES = module_names()


def place(module: str) -> tuple[int, int, bool]:
    """Layer number, line number in it, and whether modules of that line may import each other."""
    for number, lines in enumerate(LAYERS.values()):
        # A line that names the module beats a pattern.
        for exact in (True, False):
            for index, line in enumerate(lines):
                pattern, _, together = line.partition(" ")
                if module == pattern if exact else fnmatch.fnmatch(module, pattern):
                    return number, index, bool(together)
    pytest.fail(f"{PACKAGE}.{module} is in no layer: put it into the table of {__file__}")


def imports(path: Path, package: str) -> set[str]:
    """Dotted names that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def internal(name: str) -> str | None:
    """The module of this package that an imported name means, or None for other packages."""
    if name.split(".")[0] != PACKAGE:
        return None
    below = name.removeprefix(PACKAGE).lstrip(".")
    while below not in MODULES:
        below = below.rpartition(".")[0]
    return below


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    inside = [PACKAGE, *(module.split(".") if module else [])]
    return imports(path, ".".join(inside if path.name == "__init__.py" else inside[:-1]))


def upward_imports(module: str) -> list[str]:
    layer, line, together = place(module)
    wrong = []
    for name in sorted(imports_of(module)):
        target = internal(name)
        if target is None or target == module:
            continue
        if target == "":
            # The package itself stands above everything; entry points and tools may use it.
            if layer < 3:
                wrong.append(f"{name} (the package itself)")
            continue
        at = place(target)[:2]
        if at > (layer, line) or (at == (layer, line) and not together):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_imports_point_down(module):
    wrong = upward_imports(module)
    assert not wrong, f"{PACKAGE}.{module} imports from above or beside itself: {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_linen_and_torch_stay_out(module):
    tops = {name.split(".")[0] for name in imports_of(module)}
    never = set() if module == MEASURES_TORCH else NEVER
    if any(fnmatch.fnmatch(module, pattern) for pattern in MAY_USE_TRANSFORMERS):
        never = NEVER - {"transformers"}
    assert not tops & never
    if module not in LINEN:
        linen = {n for n in imports_of(module) if n.startswith(("flax.linen", "flax.nnx"))}
        assert not linen, f"only {LINEN} import flax.linen"


def test_config_knows_no_jax():
    assert not {n for n in imports_of("config") if n.split(".")[0] in ("jax", "flax", "numpy")}


def test_the_check_sees_an_upward_import(monkeypatch, tmp_path):
    bad = tmp_path / "rope.py"
    for line in (
        "from freqkv_jax.kv.state import KVState",
        "from .kv import state",
        "import freqkv_jax.sharding",
        "def f():\n    from freqkv_jax import decode",
    ):
        bad.write_text(line)
        monkeypatch.setitem(MODULES, "rope", bad)
        assert upward_imports("rope"), line
    bad.write_text("from freqkv_jax.config import RopeConfig\nfrom . import config")
    assert not upward_imports("rope")


def test_import_is_light():
    code = f"import sys, freqkv_jax; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]", f"import freqkv_jax loads {run.stdout.strip()}"


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE).rglob("*.py")), ids=lambda p: p.stem)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400, "split it: a file is at most 400 lines"
