"""A study as one HTML page that needs nothing else: no network, no font, and no script but a line that brings a wide graph into view.

First what a reader wants (the table and what it comes to, pictures), then why (drift, training, quantizers, stages), then what it rests on
(integers and time, the ladder, how it was measured).
"""

from html import escape
from pathlib import Path

from crqat_fx.files import written
from crqat_fx.findings import Study
from crqat_fx.graph_picture import styles as styles_of_graphs
from crqat_fx.report_parts import section
from crqat_fx.report_proof import INTEGERS, LADDER, MEASURED
from crqat_fx.report_reasons import DRIFT, QUANTIZATION, STAGES, TRAINING
from crqat_fx.report_results import PICTURES, RESULTS, verdict
from crqat_fx.report_style import STYLE

PARTS = (RESULTS, PICTURES, DRIFT, TRAINING, QUANTIZATION, STAGES, INTEGERS, LADDER, MEASURED)

# where the graph is wider than its region, the region shows its first box
INTO_VIEW = (
    "for (const region of document.querySelectorAll('.graph')) { const box = region.querySelector('.box')?.getBoundingClientRect(); "
    "if (box) region.scrollLeft += box.left + box.width / 2 - region.getBoundingClientRect().left - region.clientWidth / 2 }"
)


def write_report(study: Study, path: str | Path) -> None:
    with written(path) as temporary:
        temporary.write_text(page(study), encoding="utf-8", errors="backslashreplace")


def page(study: Study) -> str:
    title = study.title or "crqat-fx report"
    links = "".join(f'<li><a href="#{part.address}">{escape(part.heading)}</a></li>' for part in PARTS)
    about = f"{study.data}, {study.size} px, {study.names} names; {', '.join(model.label for model in study.models)}"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',  # a browser asks a server for one where none is named
            f"<title>{escape(title)}</title><style>{STYLE}{styles_of_graphs()}</style></head><body>",
            '<a class="skip" href="#main">Skip to the results</a>',
            f'<header><h1>{escape(title)}</h1><p class="about">{escape(about)}</p></header>',
            f'<nav aria-label="contents"><ol>{links}</ol></nav>',
            f'<main id="main" tabindex="-1"><p class="verdict">{escape(verdict(study))}</p>',
            *(section(part, study) for part in PARTS),
            f"</main><script>{INTO_VIEW}</script></body></html>\n",
        ]
    )
