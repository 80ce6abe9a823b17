"""What was measured, as pictures.

Of a comparison with a teacher:
heatmaps.png        each anchor's mean cosine similarity to the others of its class, teacher beside student
distributions.png   all similarities and confidences, teacher against student
scatter.png         distortion in confidence space against distortion in embedding space, a dot a picture, with Pearson's r

Of a sensitivity:    every block's SQNR at each width that was tried, what a proposal chose, and the AP that a block costs alone
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from crqat_fx.distortion import SPACES, DistortionResult, Example, Histogram
from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.graph_picture import BORDERS, UNMARKED_BORDER, short
from crqat_fx.mixed_recipe import Proposal
from crqat_fx.noise import decibels
from crqat_fx.sensitivity import Sensitivity

DPI = 150
TEACHER, STUDENT = "#3b6fb6", "#d1603d"
KIND_TITLES = {"region_text": "region-text", "region_region": "region-region"}
MEASURES = {
    ("region_text", "embedding"): "cosine similarity",
    ("region_text", "confidence"): "confidence in the text",
    ("region_region", "embedding"): "cosine similarity",
    ("region_region", "confidence"): "cosine similarity of score vectors",
}


def write_plots(result: DistortionResult, folder: Path) -> list[Path]:
    """Draws the three figures into `folder` and says where they are. Heat maps are left out where no class has two anchors."""
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, not a folder", where=folder, remedy="name a folder for the plots")
    figures = {"distributions.png": distributions_figure(result), "scatter.png": scatter_figure(result)}
    if result.examples:
        figures["heatmaps.png"] = heatmaps_figure(result.examples)
    paths = []
    for name, figure in sorted(figures.items()):
        path = folder / name
        with written(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
        paths.append(path)
    return paths


def heatmaps_figure(examples: Sequence[Example]) -> Figure:
    """A row a picture: the picture with its truth, then the teacher's and the student's anchors on one colour scale."""
    values = np.concatenate([np.concatenate([example.teacher, example.student]) for example in examples])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    figure = Figure(figsize=(10.5, 3.05 * len(examples) + 0.5), layout="constrained")
    rows = figure.subplots(len(examples), 3, squeeze=False)
    for axes, example in zip(rows, examples, strict=True):
        _show_truth(axes[0], example)
        _show_anchors(axes[1], example, example.teacher, low, high)
        drawn = _show_anchors(axes[2], example, example.student, low, high)
    for axis, title in zip(rows[0], ("picture", "teacher", "student"), strict=True):
        axis.set_title(title)
    figure.colorbar(drawn, ax=rows[:, 1:], label="mean cosine similarity to the other anchors of the class", shrink=0.8, pad=0.02)
    return figure


def _show_truth(axis: Axes, example: Example) -> None:
    axis.imshow(example.picture)
    for (left, top, right, bottom), name in zip(example.boxes.tolist(), example.names, strict=True):
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=2.2))
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="black", linewidth=0.9))
        style = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        inward = ("right", right) if left + right > example.picture.shape[1] else ("left", left)
        axis.text(inward[1], max(top, 0.06 * bottom), name, fontsize=6, ha=inward[0], va="bottom", bbox=style, clip_on=True)
    _bare(axis, example)
    axis.set_ylabel(example.name, fontsize=7)


def _show_anchors(axis: Axes, example: Example, values: np.ndarray, low: float, high: float) -> PatchCollection:
    """Each anchor as the square of its cell, coarse ones below; one without another of its class has no value and stays hollow."""
    axis.imshow(example.picture.mean(2), cmap="gray", vmin=-120, vmax=330)
    order = np.argsort(-example.strides, kind="stable")
    corners, sides = example.points - example.strides[:, None] / 2, example.strides
    cells = [Rectangle((corners[i, 0], corners[i, 1]), sides[i], sides[i]) for i in order]
    drawn = PatchCollection(cells, cmap="viridis", edgecolor="white", linewidth=0.4)
    drawn.set_array(np.ma.masked_invalid(values[order]))
    drawn.set_clim(low, high)
    axis.add_collection(drawn)
    _bare(axis, example)
    axis.set_xlabel(f"mean {np.nanmean(values):.3f}", fontsize=8)
    return drawn


def _bare(axis: Axes, example: Example) -> None:
    height, width = example.picture.shape[:2]
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def distributions_figure(result: DistortionResult) -> Figure:
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    rows = figure.subplots(len(KIND_TITLES), len(SPACES), squeeze=False)
    for row, (kind, title) in zip(rows, KIND_TITLES.items(), strict=True):
        for axis, space in zip(row, SPACES, strict=True):
            _show_histogram(axis, result.histograms[kind][space])
            error = getattr(result, kind).as_dict()[space]
            name = f"{title}, {space} space" + ("" if error is None else f" (MAE {error:.4f})")
            axis.set(title=name, xlabel=MEASURES[kind, space], ylabel="share")
    rows[1][0].legend(frameon=False, loc="upper left")
    rows[0][1].set_yscale("log")  # most confidences are near zero
    return figure


def _show_histogram(axis: Axes, histogram: Histogram) -> None:
    for counts, colour, label in ((histogram.teacher, TEACHER, "teacher"), (histogram.student, STUDENT, "student")):
        axis.stairs(counts / max(int(counts.sum()), 1), histogram.edges, color=colour, fill=True, alpha=0.35)
        axis.stairs(counts / max(int(counts.sum()), 1), histogram.edges, color=colour, linewidth=1.4, label=label)
    used = np.flatnonzero(histogram.teacher + histogram.student)
    if len(used):
        axis.set_xlim(histogram.edges[used[0]], histogram.edges[used[-1] + 1])
    axis.spines[["top", "right"]].set_visible(False)


def scatter_figure(result: DistortionResult) -> Figure:
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axis, (kind, title) in zip(figure.subplots(1, len(KIND_TITLES)), KIND_TITLES.items(), strict=True):
        distortion = getattr(result, kind)
        axis.scatter(distortion.embedding, distortion.confidence, s=14, color=STUDENT, alpha=0.6, linewidths=0)
        both = int((~np.isnan(distortion.embedding) & ~np.isnan(distortion.confidence)).sum())
        r = "not defined" if math.isnan(distortion.pearson) else f"{distortion.pearson:.3f}"
        axis.set(
            title=f"{title}: Pearson's r {r} over {both} pictures",
            xlabel="MAE in embedding space",
            ylabel="MAE in confidence space",
        )
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# --- sensitivity ---

MARKERS = "osD^vP*X"
LOUDEST = 80.0  # decibels: what lies beyond is drawn at the edge


def write_sensitivity(found: Sensitivity, path: Path, proposal: Proposal | None = None) -> None:
    with written(path) as temporary:
        sensitivity_figure(found, proposal).savefig(temporary, format=path.suffix.removeprefix("."), dpi=DPI)


def sensitivity_figure(found: Sensitivity, proposal: Proposal | None = None) -> Figure:
    """A row a block, in the order of the data. Left is what suffers most."""
    scored = found.float_ap is not None
    figure = Figure(figsize=(11 if scored else 8, 1.9 + 0.26 * len(found.blocks)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)) if scored else [figure.subplots()]
    _show_noise(axes[0], found, proposal)
    if scored:
        _show_cost_in_ap(axes[1], found)
    axes[0].set_yticks(range(len(found.blocks)), [short(each.block) for each in found.blocks], fontsize=8)
    axes[0].set_ylim(len(found.blocks) - 0.5, -0.5)
    return figure


def _show_noise(axis: Axes, found: Sensitivity, proposal: Proposal | None) -> None:
    tried = list(dict.fromkeys(str(each.widths) for options in proposal.options.values() for each in options)) if proposal else []
    for row, each in enumerate(found.blocks):
        colour = BORDERS.get(each.stage, UNMARKED_BORDER)
        axis.axhline(row, color="#dddddd", linewidth=0.6, zorder=0)
        options = proposal.options.get(each.block, ()) if proposal is not None else ()
        for option in options:
            chosen = proposal is not None and proposal.chosen[each.block] == option.widths
            face = colour if chosen else "white"
            marker = MARKERS[tried.index(str(option.widths)) % len(MARKERS)]
            axis.scatter(
                min(decibels(option.share), LOUDEST),
                row,
                marker=marker,
                s=34,
                edgecolors=colour,
                facecolors=face,
                zorder=3 if chosen else 2,
            )
        if not options:
            axis.scatter(min(each.db, LOUDEST), row, marker="o", s=34, color=colour, zorder=2)
    for number, widths in enumerate(tried):
        axis.scatter([], [], marker=MARKERS[number % len(MARKERS)], s=34, edgecolors="#444444", facecolors="white", label=widths)
    if proposal is not None:
        axis.scatter([], [], marker="s", s=34, color="#444444", label="chosen")
        axis.legend(
            title="weight-activation bits",
            frameon=False,
            fontsize=8,
            title_fontsize=8,
            ncols=4,
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
        )
    told = f"all quantized: {decibels(found.share):.1f} dB"
    if proposal is not None:
        told += f"; the proposal: {proposal.measured:.1f} dB"
    axis.set_xlabel(f"SQNR of detections with this block alone quantized, dB (over {LOUDEST:.0f} at the edge)\n{told}", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _show_cost_in_ap(axis: Axes, found: Sensitivity) -> None:
    whole = found.float_ap or 0.0
    for row, each in enumerate(found.blocks):
        axis.axhline(row, color="#dddddd", linewidth=0.6, zorder=0)
        axis.barh(row, whole - (each.ap or 0.0), height=0.6, color=BORDERS.get(each.stage, UNMARKED_BORDER), zorder=2)
    axis.axvline(0, color="#444444", linewidth=0.8)
    lost = "" if found.ap is None else f"; all quantized: {whole - found.ap:.1f}"
    axis.set_xlabel(f"AP lost by this block alone, of {whole:.1f} on {found.ap_pictures} pictures{lost}", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
