"""Renders docs/evidence.md and its figures from the results files.

    python -m benchmarks.study_kl_tokens.page

Analyses benchmarks/results/kl_tokens_NAME.jsonl into kl_tokens.json, from which every number of the
page is read.
"""

from __future__ import annotations

import json
from itertools import compress
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from benchmarks.study_kl_tokens.analysis import DRAWS, analyse
from benchmarks.study_kl_tokens.page.rule import (
    STATED_ERROR,
    cheapest,
    checks,
    findings,
    gain_text,
    prompts_to_rank,
    prompts_to_state,
    recommendation,
    recommended,
)
from benchmarks.study_kl_tokens.page.view import NAMES, View, model_title
from benchmarks.study_kl_tokens.rows import RowsFile
from benchmarks.study_kl_tokens.variants import USEFUL, Study
from heretic_kl.files import write_text

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks/results"
MODELS = ("demo", "base")
"""Whose results come first."""
FEWEST = 20
"""Edits of a model below which nothing is said of it."""
Figures = dict[str, Any]
"""`models`: what was analysed, the demo model's first. `unfinished`: model -> edits, too few.
`quick`: the time of a run with --quick; None: none was timed."""


def main() -> None:
    """Analyse, draw, write; print what was written."""
    from benchmarks.study_kl_tokens.page.figures import draw_all

    content = analysed(RESULTS)
    figures = RESULTS / "kl_tokens.json"
    write_text(figures, json.dumps(content, indent=0) + "\n")
    (ROOT / "docs/figures").mkdir(parents=True, exist_ok=True)
    drawn = draw_all(content["models"], ROOT / "docs/figures")
    write_text(ROOT / "docs/evidence.md", page(content))
    for path in (figures, *drawn, ROOT / "docs/evidence.md"):
        print(path.relative_to(ROOT))


def analysed(results: Path, draws: int = DRAWS) -> Figures:
    """Figures of every model of which enough was measured.

    Raises:
        SystemExit: of no model was.
    """
    files = [file for file in results.glob("kl_tokens_*.jsonl") if "_quick" not in file.stem]
    if not files:
        raise SystemExit(f"nothing measured in {results}: run python -m benchmarks.study_kl_tokens")
    names = {file.stem.removeprefix("kl_tokens_"): file for file in files}
    order = [*(n for n in MODELS if n in names), *sorted(set(names) - set(MODELS))]
    studies = {name: Study(RowsFile.read(names[name])) for name in order}
    ready = [study for study in studies.values() if len(study.rows) >= FEWEST]
    if not ready:
        raise SystemExit(f"no model of {results} has {FEWEST} edits yet")
    timed = results / "kl_tokens_demo_quick.json"
    return {
        "models": [analyse(study, draws) for study in ready],
        "quick": json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else None,
        "unfinished": {n: len(s.rows) for n, s in studies.items() if len(s.rows) < FEWEST},
    }


def page(content: Figures) -> str:
    """The page of these figures."""
    models = content["models"]
    template = Path(__file__).parent / "evidence.md.j2"
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["compress"] = compress
    source = environment.from_string(template.read_text(encoding="utf-8"))
    statements = findings(models)
    real = [place for place, model in enumerate(models) if model["model"] != "base"]
    everywhere = [s.text for s in statements if all(s.holds[place] for place in real)]
    return source.render(
        models=[View(model) for model in models],
        unfinished=content["unfinished"],
        rule=checks(models),
        best=recommended(models),
        chosen=recommendation(models),
        findings=statements,
        real=[model_title(models[place]["model"]) for place in real],
        everywhere=everywhere,
        first_gain=gain_text(3, USEFUL),
        demo_only=[s.text for s in statements if s.holds[0] and s.text not in everywhere],
        quick=content["quick"],
        cheapest=cheapest,
        prompts_to_rank=prompts_to_rank,
        prompts_to_state=prompts_to_state,
        STATED_ERROR=STATED_ERROR,
        **NAMES,
    )


if __name__ == "__main__":
    main()
