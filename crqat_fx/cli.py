"""The command line: each command reads its settings, calls the Python API, and shows what came back.

Torch and everything heavy is imported inside the commands, so that help answers at once.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crqat_fx import __version__, console
from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.recipe import DEFAULT_RECIPE, DEFAULT_TARGET
from crqat_fx.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import nn

    from crqat_fx.checkpoint import Checkpoint
    from crqat_fx.models.yolo_world import YoloWorld

SETTINGS = "settings.yaml"  # beside a result, in its folder

app = typer.Typer(
    help="From a published YOLO-World checkpoint to a low-bit model that still knows its classes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "a checkpoint: official .pth, ultralytics .pt, this project's own; or a shipped model of the drawn task: pico-v1, pico-v2"
RUNNABLE_HELP = f"{MODEL_HELP}; or a prepared and calibrated model"
ON_PAPER_HELP = "or a preset without weights, such as yolo-world-v1-l"
Runnable = Annotated[str, typer.Argument(help=RUNNABLE_HELP, show_default=False)]
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings; a flag beats it", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps  [default: cpu]", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="processor threads  [default: torch's choice]", show_default=False)]
VocabularyFile = Annotated[Path | None, typer.Option(help="vocabulary .npz, in place of the model's own", show_default=False)]
PictureSize = Annotated[
    int | None, typer.Option(help="picture size, a multiple of 32  [default: the file's, else 640]", show_default=False)
]


def _show_version(wanted: bool) -> None:
    if wanted:
        console.show(f"crqat-fx {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", help="print the version", callback=_show_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="say what the passes left alone, and why")] = False,
) -> None:
    console.start_logging(debug)


def _given(**flags: Any) -> dict[str, Any]:
    """The flags that were given; None stands for one that was not."""
    return {name: value for name, value in flags.items() if value is not None}


def _beside(result: Path) -> Path:
    """Where the settings of a result that is one file go."""
    return result.with_name(f"{result.name}.{SETTINGS}")


def _command(*arguments: object) -> str:
    """What was run, for the head of a settings file."""
    return " ".join(["crqat-fx", *(ascii(argument) if " " in str(argument) else str(argument) for argument in arguments)])


@app.command()
def detect(
    model: Runnable,
    pictures: Annotated[
        list[str], typer.Argument(help="pictures, folders (searched through), patterns such as 'photos/*.jpg', videos", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="folder for the drawn pictures, detections.json and settings.yaml")] = Path("detections"),
    vocabulary: VocabularyFile = None,
    text: Annotated[
        str | None,
        typer.Option(help="names out of the vocabulary, separated by commas; one that holds a comma in double quotes", show_default=False),
    ] = None,
    conf: Annotated[
        float | None, typer.Option(help="lowest score that is drawn; lower it for rare things  [default: 0.25]", show_default=False)
    ] = None,
    iou: Annotated[float | None, typer.Option(help="overlap above which NMS drops a box  [default: 0.7]", show_default=False)] = None,
    most: Annotated[int | None, typer.Option("--max", help="most detections a picture  [default: 300]", show_default=False)] = None,
    size: PictureSize = None,
    batch: Annotated[int | None, typer.Option(help="pictures run at once  [default: 1]", show_default=False)] = None,
    device: Device = None,
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Find the vocabulary's things on pictures; draw them and write COCO-style detections.json.

    A picture that cannot be read is skipped and named; the exit status is then 1.
    """
    from crqat_fx.detect import RESULT, DetectSettings, carried_settings, detect_pictures, open_detector
    from crqat_fx.pictures import find_sources

    sources = find_sources(pictures, without=out)
    loaded, checkpoint = _load(model)
    flags = _given(
        vocabulary=vocabulary, text=text, conf=conf, iou=iou, max=most, size=size, batch=batch, device=device, threads=threads
    )  # fmt: skip
    resolved = resolve(DetectSettings, flags, config, carried_settings(checkpoint))
    detector = open_detector(loaded, checkpoint, resolved.values)

    def keep_settings() -> None:
        resolved.write(out / SETTINGS, _command("detect", model, *pictures))

    with console.progress("detect") as progress:
        batch_size = resolved.values.batch
        report = detect_pictures(detector, sources, out, batch=batch_size, progress=progress, before_drawing=keep_settings)
    if as_json:
        console.show_json(
            {
                "out": str(out),
                "pictures": report.pictures,
                "detections": json.loads((out / RESULT).read_text(encoding="utf-8")),
                "counts": dict(report.counts),
                "skipped": [dataclasses.asdict(one) for one in report.skipped],
                "settings": resolved.as_json(),
            }
        )
    else:
        console.show(console.table(f"{report.pictures} pictures", ("name", "found"), list(report.counts.items())))
        console.note(f"drawn pictures and detections.json are in {out}")
    if report.skipped:
        console.note(f"{len(report.skipped)} skipped: {', '.join(one.name for one in report.skipped)}")
        raise typer.Exit(1)


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of the command `embed`."""

    encoder: Path | None = None
    tokenizer: Path | None = None  # None looks in the encoder's folder
    batch: int = 64


@app.command()
def embed(
    names: Annotated[
        Path,
        typer.Argument(
            help="names, one a line (# starts a comment, a/b gives a synonym), or JSON; or a data.yaml, for every text it needs",
            show_default=False,
        ),
    ],
    encoder: Annotated[
        Path | None, typer.Option(help="CLIP text encoder: a transformers folder, or an official .pth that carries it", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="the vocabulary to write")] = Path("vocabulary.npz"),
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder of CLIP's tokenizer files  [default: the encoder's]", show_default=False)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="names embedded at once  [default: 64]", show_default=False)] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Compute a vocabulary (names and their embeddings) with CLIP's text encoder.

    The prompt is the bare name, of synonyms the first. Needs the extra `clip`; nothing is downloaded.
    """
    from crqat_fx.models.text import embed as compute
    from crqat_fx.vocabulary import read_names

    resolved = resolve(EmbedSettings, _given(encoder=encoder, tokenizer=tokenizer, batch=batch), config)
    settings = resolved.values
    if settings.encoder is None:
        raise UserError(
            "no text encoder", where="--encoder", remedy="name a transformers folder of CLIP, or an official .pth that carries it"
        )
    listed: tuple[str, ...]
    if names.suffix in (".yaml", ".yml"):
        from crqat_fx.data.config import read_data, texts_needed

        needed = texts_needed(read_data(names))
        listed, prompts = tuple(needed), list(needed.values())
    else:
        listed, prompts = read_names(names), None
    with console.progress("embed") as progress:
        vocabulary = compute(listed, settings.encoder, settings.tokenizer, prompts=prompts, batch=settings.batch, progress=progress)
    vocabulary.save(out)
    resolved.write(_beside(out), _command("embed", names))
    if as_json:
        console.show_json({"out": str(out), "names": len(vocabulary), "width": vocabulary.width, "settings": resolved.as_json()})
    else:
        console.note(f"{len(vocabulary)} names, embeddings {vocabulary.width} wide, in {out}")


@dataclass(frozen=True)
class InspectSettings:
    """Settings of the command `inspect`."""

    depth: int = 2  # 0 shows all
    stages: Literal[2, 3] = 2


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; {ON_PAPER_HELP}", show_default=False)],
    depth: Annotated[
        int | None,
        typer.Option(
            help="how far to open the tree: 1 backbone, neck, head; 2 their layers; 0 all  [default: 2]", min=0, show_default=False
        ),
    ] = None,
    graph: Annotated[Path | None, typer.Option(help="draw the graph, its stages in colour, into this .svg", show_default=False)] = None,
    stages: Annotated[
        int | None, typer.Option(help="2: backbone, neck-head; 3: backbone, neck, head  [default: 2]", show_default=False)
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show what a model is: size, version, parameters, vocabulary, and its blocks with channels and strides."""
    from crqat_fx.inspection import inspect_model, tree

    if graph is not None and graph.suffix != ".svg":
        raise UserError(f"{graph.name} is no .svg", where="--graph", remedy="name a file that ends in .svg")
    resolved = resolve(InspectSettings, _given(depth=depth, stages=stages), config)
    loaded, checkpoint = _model_or_preset(model)
    report = inspect_model(loaded, checkpoint, depth=resolved.values.depth or None)
    if graph is not None:
        from crqat_fx.graph_picture import save_picture
        from crqat_fx.pipelines import mark_stages
        from crqat_fx.trace import trace

        traced = trace(loaded)
        mark_stages(resolved.values.stages)(traced)
        save_picture(traced, graph, f"{checkpoint.path.name}: YOLO-World v{report['version']} {report['size'] or ''}".strip())
        resolved.write(_beside(graph), _command("inspect", model))
    if as_json:
        console.show_json(report)
    else:
        console.show(tree(report))
    if graph is not None:
        console.note(f"drawn: {graph}")


def _model_or_preset(name: str) -> "tuple[YoloWorld, Checkpoint]":
    """The model of a file; of a preset's name such as `yolo-world-v1-s`, one of that shape with freshly drawn weights."""
    from crqat_fx.checkpoint import Checkpoint, load_model
    from crqat_fx.cost import model_on_paper
    from crqat_fx.models.yolo_world import YoloWorld

    on_paper = model_on_paper(name)
    if on_paper is None:
        return load_model(name)
    model = YoloWorld(on_paper.config).eval()
    return model, Checkpoint(Path(name), "preset", model.config, model.state_dict())


@dataclass(frozen=True)
class ShapesSettings:
    """Settings of the command `shapes`."""

    train: int = 8000
    val: int = 500
    calibration: int = 256
    size: int = 160
    seed: int = 0
    workers: int = 2


@app.command()
def shapes(
    out: Annotated[Path, typer.Option(help="new or empty folder for the set", show_default=False)],
    train: Annotated[int | None, typer.Option(min=0, help="training pictures  [default: 8000]", show_default=False)] = None,
    val: Annotated[
        int | None, typer.Option(min=0, help="validation pictures, uniform over all 240 names  [default: 500]", show_default=False)
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(min=0, help="calibration pictures, drawn like training's  [default: 256]", show_default=False)
    ] = None,
    size: Annotated[int | None, typer.Option(help="picture size  [default: 160]", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="of the task: vocabulary and pictures  [default: 0]", show_default=False)] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="drawing processes; 0 draws in this one  [default: 2]", show_default=False)
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Draw the open-vocabulary task of coloured shapes and write it as a COCO-format set with its vocabulary.

    The same pictures stream without a disk wherever --data shapes is given.
    """
    from crqat_fx.data.shapes import ShapesTask, write_coco

    flags = _given(train=train, val=val, calibration=calibration, size=size, seed=seed, workers=workers)
    resolved = resolve(ShapesSettings, flags, config)
    settings = resolved.values
    counts = {name: getattr(settings, name) for name in ("train", "val", "calibration") if getattr(settings, name)}
    with console.progress("shapes") as progress:
        data = write_coco(ShapesTask(settings.seed, settings.size), out, counts, workers=settings.workers, progress=progress)
    resolved.write(out / SETTINGS, _command("shapes"))
    if as_json:
        console.show_json({"data": str(data), "pictures": counts, "settings": resolved.as_json()})
    else:
        console.note(f"{sum(counts.values())} pictures in {out}; give {data} to --data")


@app.command()
def evaluate(
    model: Runnable,
    data: Annotated[str, typer.Option(help="a data.yaml; or shapes, the drawn task", show_default=False)],
    metric: Annotated[
        str | None, typer.Option(help="coco: COCO's AP; lvis-fixed: LVIS' Fixed AP, federated truth  [default: coco]", show_default=False)
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="validation pictures of the drawn task  [default: 500]", show_default=False)
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="vocabulary .npz, in place of the data's or else the model's own", show_default=False)
    ] = None,
    conf: Annotated[float | None, typer.Option(help="lowest score that counts  [default: 0.001]", show_default=False)] = None,
    iou: Annotated[float | None, typer.Option(help="overlap above which NMS drops a box  [default: 0.7]", show_default=False)] = None,
    most: Annotated[
        int | None, typer.Option("--max", help="detections kept a picture  [default: 300; lvis-fixed 1000]", show_default=False)
    ] = None,
    size: PictureSize = None,
    batch: Annotated[int | None, typer.Option(help="pictures run at once  [default: 8]", show_default=False)] = None,
    device: Device = None,
    threads: Threads = None,
    teacher: Annotated[
        str | None, typer.Option(help="also measure how far the regions drift from this model's", show_default=False)
    ] = None,
    compared: Annotated[int | None, typer.Option(help="pictures compared with it  [default: 512]", show_default=False)] = None,
    plots: Annotated[
        Path | None, typer.Option(help="folder for heat maps, distributions and the scatter; needs --teacher", show_default=False)
    ] = None,
    classes: Annotated[bool, typer.Option("--classes", help="a row for each class")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for evaluation.json and settings.yaml", show_default=False)] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Score a model on a set: AP, by frequency and by base and novel names where the set tells them apart.

    The vocabulary may be another than training's (zero-shot). With --teacher also the distortion of region-text and region-region
    similarity. A picture that cannot be read is left out and named; the exit status is then 1.
    """
    from crqat_fx.data.opening import SHAPES, open_evaluation, size_of_data
    from crqat_fx.detect import carried_settings, open_detector
    from crqat_fx.distortion import distortion
    from crqat_fx.evaluate import EvaluateSettings
    from crqat_fx.evaluate import evaluate as score

    if plots is not None and teacher is None:
        raise UserError("compares with a teacher", where="--plots", remedy="name one with --teacher")
    loaded, checkpoint = _load(model)
    flags = _given(
        metric=metric, pictures=pictures, vocabulary=vocabulary, conf=conf, iou=iou, max=most, size=size, batch=batch, device=device,
        threads=threads, compared=compared,
    )  # fmt: skip
    resolved = resolve(EvaluateSettings, flags, config, size_of_data(data) | carried_settings(checkpoint))
    settings = resolved.values
    if data != SHAPES and resolved.origins["pictures"] in ("flag", "config") and settings.pictures != EvaluateSettings.pictures:
        raise UserError("means nothing to a data.yaml, which names its own pictures", where="--pictures", remedy="leave it out")
    dataset, texts = open_evaluation(data, settings.size, settings.pictures)
    source = "settings" if settings.vocabulary is not None else "model" if texts is None else "data"
    if source == "data":
        checkpoint = dataclasses.replace(checkpoint, vocabulary=texts)
    detector = open_detector(loaded, checkpoint, settings.detecting)
    report: dict[str, Any] = {"model": model, "data": data, "vocabulary": {"names": len(detector.names), "from": source}}
    if teacher is not None:
        reference, _ = _load(teacher)
        with console.progress("distortion") as progress:
            drift = distortion(
                loaded, reference.to(detector.device), dataset, detector.vocabulary, size=settings.size, limit=settings.compared,
                batch_size=settings.batch, device=detector.device, progress=progress,
            )  # fmt: skip
        report |= {"teacher": teacher, "distortion": drift.as_dict()}
    with console.progress("evaluate") as progress:
        result = score(detector, dataset, settings.metric, batch_size=settings.batch, progress=progress)
    report |= result.as_dict() | {"settings": resolved.as_json()}
    run = _command("evaluate", model, "--data", data, *(("--teacher", teacher) if teacher is not None else ()))
    if plots is not None:
        from crqat_fx.plots import write_plots

        report["plots"] = [str(path) for path in write_plots(drift, plots)]
        resolved.write(plots / SETTINGS, run)
    if out is not None:
        with written(out / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
        resolved.write(out / SETTINGS, run)
    if as_json:
        console.show_json(report)
    else:
        _show_evaluation(report, classes)
    if result.skipped:
        console.note(f"{len(result.skipped)} pictures left out: {', '.join(result.skipped)}")
        raise typer.Exit(1)


def _show_evaluation(report: dict[str, Any], classes: bool) -> None:
    head = ("", "AP", "AP50", "AP75", "small", "medium", "large", "AR")
    rows: list[tuple[str, dict[str, Any]]] = [("all", report["scores"]), *report["split"].items(), *report["frequency"].items()]
    title = f"{report['metric']} on {report['pictures']} pictures with {report['objects']} objects"
    console.show(console.table(title, head, [(name, *scores.values()) for name, scores in rows]))
    if classes:
        per_class = [(one["name"], one["objects"], one["detections"], one["scores"]["ap"]) for one in report["classes"]]
        console.show(console.table("classes", ("name", "objects", "detections", "AP"), per_class))
    if "distortion" in report:
        drift = report["distortion"]
        rows_of_drift = [(kind, *(drift[kind][key] for key in drift[kind])) for kind in ("region_text", "region_region")]
        title = f"distortion on {drift['pictures']} pictures, {drift['anchors']} anchors"
        console.show(console.table(title, ("similarity", *drift["region_text"]), rows_of_drift, digits=4))
    for path in report.get("plots", ()):
        console.note(f"drawn: {path}")


@app.command("passes")
def list_passes(as_json: Json = False) -> None:
    """List the passes of each schedule, in order, with what they do."""
    from crqat_fx.pipelines import passes_in_order

    rows = passes_in_order()
    if as_json:
        console.show_json([{"schedule": schedule, "pass": name, "does": does} for schedule, name, does in rows])
    else:
        console.show(console.table("passes", ("schedule", "pass", "what it does"), rows))


@dataclass(frozen=True)
class CostSettings:
    """Settings of the command `cost`."""

    recipe: str | None = None  # None is all float
    vocabulary: str = "80"
    size: int = 640
    target: str = DEFAULT_TARGET


@app.command()
def cost(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; {ON_PAPER_HELP}", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option(help="4-4-8, 8-8-8-int, ... or a YAML file  [default: all float]", show_default=False)
    ] = None,
    vocabulary: Annotated[str | None, typer.Option(help="how many texts, or a vocabulary .npz  [default: 80]", show_default=False)] = None,
    size: Annotated[int | None, typer.Option(help="picture size, a multiple of 32  [default: 640]", show_default=False)] = None,
    target: Annotated[
        str | None,
        typer.Option(help="what runs it: ort, or conv-inputs (how the published figures count)  [default: ort]", show_default=False),
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Count multiply-accumulates, bit operations and size from the graph: as published, and as an export really runs it."""
    from crqat_fx.checkpoint import load_model
    from crqat_fx.cost import cost as count
    from crqat_fx.cost import format_report, model_on_paper
    from crqat_fx.recipe import recipe_named

    resolved = resolve(CostSettings, _given(recipe=recipe, vocabulary=vocabulary, size=size, target=target), config)
    settings = resolved.values
    bits = None if settings.recipe is None else recipe_named(settings.recipe)
    shape = model_on_paper(model) or load_model(model)[0]
    texts = _texts(settings.vocabulary, shape.config.text_width)
    counted = count(shape, bits, texts, settings.size, settings.target)
    if as_json:
        console.show_json({"model": model, "recipe": settings.recipe, **counted.as_json()})
    else:
        console.show(format_report(counted))


def _texts(vocabulary: str, width: int) -> int:
    """How many texts `--vocabulary` means: a number, or a file of that width."""
    from crqat_fx.vocabulary import Vocabulary

    if vocabulary.isdecimal():
        return int(vocabulary)
    loaded = Vocabulary.load(vocabulary)
    if loaded.width != width:
        raise UserError(f"embeddings are {loaded.width} wide and the model reads {width}", where=vocabulary, remedy="give one of its width")
    return len(loaded)


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of the command `prepare`."""

    recipe: str = DEFAULT_RECIPE
    target: str = DEFAULT_TARGET
    cpu: Literal["any", "vnni"] = "any"
    method: str = "lsq"
    vocabulary: Path | None = None  # None takes the model's own
    size: int = 640
    calibrate: str | None = None  # pictures, or shapes; None leaves the quantizers without ranges
    observer: str = "omse"
    pictures: int = 256


@app.command()
def prepare(
    model: Model,
    out: Annotated[Path, typer.Option(help="the prepared model to write")] = Path("prepared.pt"),
    recipe: Annotated[
        str | None,
        typer.Option(
            help="weight-activation-attention bits, or a YAML file. 4-4-8 is the paper's; without 4-bit kernels 4-bit activations cost "
            "accuracy and give nothing back  [default: 4-8-8-int]",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="what will run it: ort, or conv-inputs (the paper's, OpenVINO)  [default: ort]", show_default=False)
    ] = None,
    cpu: Annotated[
        str | None, typer.Option(help="any, or vnni: 8-bit weights use all 8 bits  [default: any, 7 bits under ort]", show_default=False)
    ] = None,
    method: Annotated[str | None, typer.Option(help="how quantizers learn: lsq or pact  [default: lsq]", show_default=False)] = None,
    vocabulary: VocabularyFile = None,
    size: PictureSize = None,
    calibrate: Annotated[
        str | None, typer.Option(help="pictures to set the ranges by: a folder, or shapes, the drawn task", show_default=False)
    ] = None,
    observer: Annotated[
        str | None, typer.Option(help="omse, minmax, moving-average, percentile, entropy  [default: omse]", show_default=False)
    ] = None,
    pictures: Annotated[int | None, typer.Option(min=1, help="pictures calibrated on  [default: 256]", show_default=False)] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Put learnable quantizers into a model, where its target wants them, and set their ranges on pictures.

    Shows the passes that ran, the stages, and what stays float and why. `evaluate` and `detect` take the result.
    """
    from crqat_fx.checkpoint import load_model
    from crqat_fx.detect import DetectSettings, carried_settings, open_vocabulary
    from crqat_fx.quantize.calibrate import calibrate as set_ranges
    from crqat_fx.quantize.calibrate import picture_batches
    from crqat_fx.quantize.prepare import prepare as insert

    loaded, checkpoint = load_model(model)
    flags = _given(
        recipe=recipe, target=target, cpu=cpu, method=method, vocabulary=vocabulary, size=size, calibrate=calibrate, observer=observer,
        pictures=pictures,
    )  # fmt: skip
    resolved = resolve(PrepareSettings, flags, config, carried_settings(checkpoint))
    settings = resolved.values
    texts = open_vocabulary(checkpoint.vocabulary, DetectSettings(vocabulary=settings.vocabulary, size=settings.size), checkpoint.path)
    prepared = insert(
        loaded, recipe=settings.recipe, target=settings.target, vocabulary=texts, size=settings.size, cpu=settings.cpu,
        method=settings.method,
    )  # fmt: skip
    if settings.calibrate is not None:
        with console.progress("calibrate") as progress:
            batches = picture_batches(prepared, _calibration_pictures(settings.calibrate, settings.size, settings.pictures))
            set_ranges(prepared, batches, settings.observer, settings.pictures, progress=progress)
    prepared.save(out)
    resolved.write(_beside(out), _command("prepare", model))
    stages = [
        {"stage": stage.name, "nodes": len(stage.nodes), "modules": sum(node.op == "call_module" for node in stage.nodes),
         "quantizers": len(prepared.quantizers([stage.name]))}
        for stage in prepared.stages
    ]  # fmt: skip
    steps = [{"pass": step.name, "rewrites": step.rewrites, "ms": step.seconds * 1e3} for step in prepared.steps]
    floats = [{"path": path, "why": why} for path, why in prepared.floats()]
    if as_json:
        report = {"out": str(out), "passes": steps, "stages": stages, "float": floats, "calibrated": prepared.calibrated}
        console.show_json({**report, "settings": resolved.as_json()})
        return
    for title, rows in (("passes", steps), ("stages", stages), ("what stays float", floats)):
        if rows:
            console.show(console.table(title, list(rows[0]), [list(row.values()) for row in rows]))
    console.note(f"prepared: {out}" + ("" if prepared.calibrated else "; give --calibrate to set the ranges of its quantizers"))


def _calibration_pictures(place: str, size: int, count: int) -> "Iterator[np.ndarray]":
    """The pictures that `--calibrate` names, at most `count`, one at a time."""
    from itertools import islice

    from crqat_fx.data.opening import SHAPES
    from crqat_fx.data.shapes import ShapesTask
    from crqat_fx.pictures import find_sources, read_source

    if place == SHAPES:
        task = ShapesTask(size=size)
        return (task.draw("calibration", index).image for index in range(count))
    sources = find_sources([place])
    return (picture.pixels for picture in islice((each for source in sources for each in read_source(source)), count))


def _load(name: str) -> "tuple[nn.Module, Checkpoint]":
    """A model that runs, and what its file carries: of a checkpoint, or of a prepared model with its ranges set."""
    from crqat_fx.checkpoint import Checkpoint, load_model
    from crqat_fx.quantize.prepare import load_prepared
    from crqat_fx.quantize.prepared import is_prepared_file
    from crqat_fx.shipped import locate

    if not is_prepared_file(locate(name)):
        return load_model(name)
    prepared = load_prepared(name)
    if not prepared.calibrated or prepared.config is None:
        raise UserError("its quantizers have no ranges", where=name, remedy="prepare it again with --calibrate")
    carried = Checkpoint(Path(name), "crqat-fx", prepared.config, {}, prepared.vocabulary, extra={"size": prepared.size})
    return prepared.graph.eval(), carried


@app.command()
def pretrain(
    out: Annotated[
        Path, typer.Option(help="the run's folder: settings.yaml, log.jsonl, tensorboard/, last.pt, model.pt", show_default=False)
    ],
    model: Annotated[str | None, typer.Option(help="pico, nano, s, m, l, x, xl  [default: s]", show_default=False)] = None,
    version: Annotated[int | None, typer.Option(help="1 or 2  [default: 1]", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="a data.yaml; or shapes, the drawn task  [default: shapes]", show_default=False)] = None,
    size: Annotated[int | None, typer.Option(help="picture size, a multiple of 32  [default: 640]", show_default=False)] = None,
    texts: Annotated[int | None, typer.Option(help="texts a picture  [default: 80]", show_default=False)] = None,
    pictures: Annotated[int | None, typer.Option(help="pictures of the drawn task  [default: 8000]", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="steps in all  [default: 100000]", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="pictures a batch  [default: 16]", show_default=False)] = None,
    accumulate: Annotated[int | None, typer.Option(help="batches a step  [default: 1]", show_default=False)] = None,
    rate: Annotated[float | None, typer.Option(help="learning rate  [default: 0.002]", show_default=False)] = None,
    warmup: Annotated[int | None, typer.Option(help="steps until the full rate  [default: 3% of the steps]", show_default=False)] = None,
    schedule: Annotated[str | None, typer.Option(help="linear or constant  [default: linear]", show_default=False)] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16  [default: fp32]", show_default=False)] = None,
    device: Device = None,
    threads: Threads = None,
    workers: Annotated[
        int | None, typer.Option(help="processes that read a data.yaml's pictures  [default: 0, none]", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the weights and the order of the data  [default: 0]", show_default=False)] = None,
    log_every: Annotated[int | None, typer.Option(help="steps between log lines  [default: 20]", show_default=False)] = None,
    save_every: Annotated[int | None, typer.Option(help="steps between saves  [default: 500]", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Train a full-precision model from scratch, on the drawn task or on the sets of a data.yaml.

    The defaults are the published recipe; what has no flag (weight_decay, clip, final_rate, ema_momentum, ema_horizon, without_mosaic,
    half) is set by --config. A stopped or killed run goes on, bit for bit on a CPU, with --resume; Ctrl-C saves first.
    """
    from crqat_fx.pretrain import PretrainSettings
    from crqat_fx.pretrain import pretrain as run
    from crqat_fx.train import settings_of

    flags = _given(
        model=model, version=version, data=data, size=size, texts=texts, pictures=pictures, steps=steps, batch=batch, accumulate=accumulate,
        rate=rate, warmup=warmup, schedule=schedule, precision=precision, device=device, threads=threads, workers=workers, seed=seed,
        log_every=log_every, save_every=save_every,
    )  # fmt: skip
    resolved = resolve(PretrainSettings, flags, config, settings_of(out) if resume else None)
    with console.progress("pretrain") as progress:
        result = run(resolved.values, out, origins=resolved.origins, progress=progress, resume=resume)
    if as_json:
        console.show_json({**dataclasses.asdict(result), "settings": resolved.as_json()})
    else:
        console.note(f"step {result.steps} after {result.seconds:.0f} s; the averaged weights are {result.model}")
        for deed, counts in (("skipped", result.skipped), ("repaired", result.repaired)):
            if counts:
                console.note(f"{deed}: {', '.join(f'{count} x {kind}' for kind, count in counts.items())}")
    if result.interrupted:
        raise typer.Exit(130)


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the command `demo`."""

    pictures: int = 500


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for pictures, detections and the stage graph")] = Path("demo"),
    pictures: Annotated[int | None, typer.Option(min=1, help="validation pictures  [default: 500]", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="the same as --pictures 50")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Run the whole product on what the package carries: the drawn task and its two shipped models."""
    from crqat_fx.demo import RECIPES
    from crqat_fx.demo import demo as run

    resolved = resolve(DemoSettings, _given(pictures=50 if quick and pictures is None else pictures), config)
    with console.progress("demo") as progress:
        report = run(out, pictures=resolved.values.pictures, progress=progress)
    resolved.write(out / SETTINGS, _command("demo"))
    if as_json:
        console.show_json(report)
        return
    for title, rows in (
        (f"AP on {report['pictures']} pictures of the drawn task", report["accuracy"]),
        ("cost of an export", report["cost"]),
    ):
        console.show(console.table(title, list(rows[0]), [list(row.values()) for row in rows], digits=2))
    console.note(f"the costs of {', '.join(RECIPES)} are counted on the graph; `crqat-fx prepare` quantizes for their accuracy")
    console.note(f"drawn: {out / 'detections'} and {out / 'stages.svg'}")
