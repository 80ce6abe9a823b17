"""What does each model cost at each recipe? Bit operations and size of all presets, recipes and vocabularies, published figures beside.

python benchmarks/bench_bops.py [--quick] [--target conv-inputs|ort] [--json results.json]

Nothing is timed: the figures are counted from the graphs and are the same on every machine. With `conv-inputs`, the placement that the
published figures count, the last column compares every figure that was published; a figure that differs makes the exit status 1.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import sys
from pathlib import Path

from crqat_fx.cost import CostReport, measure, model_on_paper, price
from crqat_fx.models.yolo_world import SIZES
from crqat_fx.recipe import PRESETS, TARGETS, preset

MODELS = tuple(
    f"yolo-world-v{version}-{size}" for version in (1, 2) for size in SIZES if (version, size) != (1, "xl")
)  # as published, and ours
RECIPES = ("fp32", *PRESETS, "4-4-8-ch", "4-4-8-int")
VOCABULARIES = (80, 1203)  # COCO's and LVIS'

# (model, recipe, vocabulary) -> MiB, BOPs T: as printed in the CR-QAT paper
PUBLISHED = {
    ("yolo-world-v1-m", "fp32", 80): ("110.88", "44.56"),
    ("yolo-world-v1-m", "fp32", 1203): ("110.88", "51.82"),
    ("yolo-world-v1-m", "4-4-8", 80): ("15.11", "2.05"),
    ("yolo-world-v1-m", "4-4-8", 1203): ("15.11", "7.10"),
    ("yolo-world-v1-l", "fp32", 80): ("181.4", "90.60"),
    ("yolo-world-v1-l", "fp32", 1203): ("181.4", "98.39"),
    ("yolo-world-v1-l", "4-4-8", 80): ("24.32", "3.09"),
    ("yolo-world-v1-l", "4-4-8", 1203): ("24.32", "8.18"),
}


def verdict(report: CostReport, published: tuple[str, str] | None) -> str:
    """The published figures, and whether ours print the same."""
    if published is None:
        return ""
    figures = zip((report.total.size_mib, report.total.bops_t), published, strict=True)
    same = all(f"{value:.{len(text.partition('.')[2])}f}" == text for value, text in figures)
    return f"{published[0]} MiB, {published[1]} T: {'equal' if same else 'DIFFERS'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two models that figures were published for, at the two published recipes")
    parser.add_argument(
        "--target", choices=tuple(TARGETS), default="conv-inputs", help="where quantizers stand (default: conv-inputs, as published)"
    )
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    models = ("yolo-world-v1-m", "yolo-world-v1-l") if options.quick else MODELS
    recipes = ("fp32", "4-4-8") if options.quick else RECIPES
    results, differing = [], 0
    print(f"{'':<35}{'published convention':>26}{'as an export runs':>26}")
    print(f"{'model':<17} {'recipe':<10}{'texts':>6}{'MACs G':>9}{'BOPs T':>9}{'MiB':>9}{'MACs G':>9}{'BOPs T':>9}{'MiB':>9}  published")
    for model in models:
        for vocabulary in VOCABULARIES:
            measured = measure(model_on_paper(model), vocabulary)
            for recipe in recipes:
                report = price(measured, None if recipe == "fp32" else preset(recipe), options.target)
                published = PUBLISHED.get((model, recipe, vocabulary)) if options.target == "conv-inputs" else None
                text = verdict(report, published)
                differing += text.endswith("DIFFERS")
                columns = "".join(
                    f"{each.macs / 1e9:>9.2f}{each.bops_t:>9.2f}{each.size_mib:>9.2f}" for each in (report.total, report.export_total)
                )
                print(f"{model:<17} {recipe:<10}{vocabulary:>6}{columns}  {text}".rstrip())
                figures = {**report.total.as_json(), "export": report.export_total.as_json(), "published": published}
                results.append({"model": model, "recipe": recipe, "vocabulary": vocabulary, **figures})
    if options.json:
        written = {"benchmark": "bops", "target": options.target, "size": 640, "results": results}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
