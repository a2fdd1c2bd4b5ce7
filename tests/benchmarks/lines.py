"""Count the logical lines of the same job in Tally and beside it in another engine: `beside/JOB_ENGINE.py`.

python -m tests.benchmarks.lines
"""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent / "beside"
JOBS = {
    "tokens": "each token counts once",
    "predict": "predictions, each sample once and in order",
    "lora": "LoRA: only what is trained is saved",
    "own_loop": "your own loop, resumed in the middle of an epoch",
    "muon": "Muon and AdamW, with one norm to clip",
    "gan": "a GAN",
    "metrics": "AUROC, F1 and a confusion matrix, early stopping, the best checkpoint",
    "translation": "a translation model, weighted by tokens",
}


def programs(job: str) -> dict[str, Path]:
    """Return the programs of a job by engine, Tally first."""
    found = {path.stem.removeprefix(f"{job}_"): path for path in FOLDER.glob(f"{job}_*.py")}
    return dict(sorted(found.items(), key=lambda item: item[0] != "tally"))


def logical_lines(source: str) -> int:
    """Return the number of statements, without imports and docstrings; a text that stands alone is a docstring."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    return sum(not isinstance(node, ast.Import | ast.ImportFrom) and not _is_text(node) for node in statements)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def table() -> str:
    """Return the table of docs/comparison.md."""
    rows = ["| job | Tally | beside it |", "|---|--:|---|"]
    for job, text in JOBS.items():
        counts = {engine: logical_lines(path.read_text()) for engine, path in programs(job).items()}
        others = ", ".join(f"{count} ({engine})" for engine, count in counts.items() if engine != "tally")
        rows.append(f"| {text} | {counts['tally']} | {others} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
