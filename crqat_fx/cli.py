"""The command line: each command reads its settings, calls the Python API, and shows what came back.

Torch and everything heavy is imported inside the commands, so that help answers at once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crqat_fx import __version__, console
from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.settings import Resolved, resolve

app = typer.Typer(
    help="From a published YOLO-World checkpoint to a low-bit model that still knows its classes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "a checkpoint: official .pth, ultralytics .pt, this project's own; or a shipped model of the drawn task: pico-v1, pico-v2"
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


def _settings(resolved: Resolved[Any]) -> dict[str, Any]:
    """Resolved settings as JSON shows them: each with where it came from."""
    values = dataclasses.asdict(resolved.values)
    return {
        name: {"value": str(value) if isinstance(value, Path) else value, "from": resolved.origins[name]} for name, value in values.items()
    }


@app.command()
def detect(
    model: Model,
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
    from crqat_fx.checkpoint import load_model
    from crqat_fx.detect import RESULT, DetectSettings, carried_settings, detect_pictures, open_detector
    from crqat_fx.pictures import find_sources

    sources = find_sources(pictures, without=out)
    loaded, checkpoint = load_model(model)
    flags = _given(
        vocabulary=vocabulary, text=text, conf=conf, iou=iou, max=most, size=size, batch=batch, device=device, threads=threads
    )  # fmt: skip
    resolved = resolve(DetectSettings, flags, config, carried_settings(checkpoint))
    detector = open_detector(loaded, checkpoint, resolved.values)
    with console.progress("detect") as progress:
        report = detect_pictures(detector, sources, out, batch=resolved.values.batch, progress=progress)
    resolved.write(out / "settings.yaml")
    if as_json:
        console.show_json(
            {
                "out": str(out),
                "pictures": report.pictures,
                "detections": json.loads((out / RESULT).read_text(encoding="utf-8")),
                "counts": dict(report.counts),
                "skipped": [dataclasses.asdict(one) for one in report.skipped],
                "settings": _settings(resolved),
            }
        )
    else:
        console.show(console.table(f"{report.pictures} pictures", ("name", "found"), list(report.counts.items())))
        console.note(f"drawn pictures and detections.json are in {out}")
    if report.skipped:
        console.note(f"{len(report.skipped)} skipped: {', '.join(one.name for one in report.skipped)}")
        raise typer.Exit(1)


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
        Path, typer.Option(help="CLIP text encoder: a transformers folder, or an official .pth that carries it", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="the vocabulary to write")] = Path("vocabulary.npz"),
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder of CLIP's tokenizer files  [default: the encoder's]", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="names embedded at once")] = 64,
    as_json: Json = False,
) -> None:
    """Compute a vocabulary (names and their embeddings) with CLIP's text encoder.

    The prompt is the bare name, of synonyms the first. Needs the extra `clip`; nothing is downloaded.
    """
    from crqat_fx.models.text import embed as compute
    from crqat_fx.vocabulary import read_names

    listed: tuple[str, ...]
    if names.suffix in (".yaml", ".yml"):
        from crqat_fx.data.config import read_data, texts_needed

        needed = texts_needed(read_data(names))
        listed, prompts = tuple(needed), list(needed.values())
    else:
        listed, prompts = read_names(names), None
    with console.progress("embed") as progress:
        vocabulary = compute(listed, encoder, tokenizer, prompts=prompts, batch=batch, progress=progress)
    vocabulary.save(out)
    if as_json:
        console.show_json({"out": str(out), "names": len(vocabulary), "width": vocabulary.width})
    else:
        console.note(f"{len(vocabulary)} names, embeddings {vocabulary.width} wide, in {out}")


@app.command()
def inspect(
    model: Model,
    depth: Annotated[
        int | None,
        typer.Option(help="how far to open the tree: 1 backbone, neck, head; 2 their layers; 0 all  [default: 2]", show_default=False),
    ] = None,
    graph: Annotated[Path | None, typer.Option(help="draw the graph, its stages in colour, into this .svg", show_default=False)] = None,
    stages: Annotated[int, typer.Option(help="2: backbone, neck-head; 3: backbone, neck, head", min=2, max=3)] = 2,
    as_json: Json = False,
) -> None:
    """Show what a model is: size, version, parameters, vocabulary, and its blocks with channels and strides."""
    from crqat_fx import inspection
    from crqat_fx.checkpoint import load_model

    loaded, checkpoint = load_model(model)
    report = inspection.inspect_model(loaded, checkpoint, depth=inspection.DEPTH if depth is None else depth or None)
    if graph is not None:
        from crqat_fx.graph_picture import save_picture
        from crqat_fx.pipelines import prepare_passes
        from crqat_fx.trace import trace

        if graph.suffix != ".svg":
            raise UserError(f"{graph.name} is no .svg", where="--graph", remedy="name a file that ends in .svg")
        traced = trace(loaded)
        prepare_passes(3 if stages == 3 else 2)(traced)
        save_picture(traced, graph, f"{checkpoint.path.name}: YOLO-World v{report['version']} {report['size'] or ''}".strip())
    if as_json:
        console.show_json(report)
    else:
        console.show(inspection.tree(report))
    if graph is not None:
        console.note(f"drawn: {graph}")


@app.command()
def shapes(
    out: Annotated[Path, typer.Option(help="new folder for the set", show_default=False)],
    train: Annotated[int, typer.Option(min=0, help="training pictures")] = 8000,
    val: Annotated[int, typer.Option(min=0, help="validation pictures, uniform over all 240 names")] = 500,
    calibration: Annotated[int, typer.Option(min=0, help="calibration pictures")] = 256,
    size: Annotated[int, typer.Option(help="picture size")] = 160,
    seed: Annotated[int, typer.Option(help="seed of the task: vocabulary and pictures")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="drawing processes")] = 2,
    as_json: Json = False,
) -> None:
    """Draw the open-vocabulary task of coloured shapes and write it as a COCO-format set with its vocabulary.

    The same pictures stream without a disk wherever --data shapes is given.
    """
    from crqat_fx.data.shapes import ShapesTask, write_coco

    counts = {name: count for name, count in (("train", train), ("val", val), ("calibration", calibration)) if count}
    with console.progress("shapes") as progress:
        data = write_coco(ShapesTask(seed, size), out, counts, workers=workers, progress=progress)
    if as_json:
        console.show_json({"data": str(data), "pictures": counts, "size": size, "seed": seed})
    else:
        console.note(f"{sum(counts.values())} pictures in {out}; give {data} to --data")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="a data.yaml; or shapes, the drawn task", show_default=False)],
    metric: Annotated[
        str | None, typer.Option(help="coco: COCO's AP; lvis-fixed: LVIS' Fixed AP, federated truth  [default: coco]", show_default=False)
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="validation pictures of the drawn task")] = 500,
    vocabulary: VocabularyFile = None,
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
    from crqat_fx.checkpoint import load_model
    from crqat_fx.data.opening import open_evaluation, size_of_data
    from crqat_fx.detect import carried_settings, open_detector
    from crqat_fx.distortion import distortion
    from crqat_fx.evaluate import EvaluateSettings
    from crqat_fx.evaluate import evaluate as score

    if plots is not None and teacher is None:
        raise UserError("compares with a teacher", where="--plots", remedy="name one with --teacher")
    loaded, checkpoint = load_model(model)
    flags = _given(
        metric=metric, vocabulary=vocabulary, conf=conf, iou=iou, max=most, size=size, batch=batch, device=device, threads=threads,
        compared=compared,
    )  # fmt: skip
    resolved = resolve(EvaluateSettings, flags, config, size_of_data(data) | carried_settings(checkpoint))
    settings = resolved.values
    dataset, texts = open_evaluation(data, settings.size, pictures)
    if settings.vocabulary is None and texts is not None:
        checkpoint = dataclasses.replace(checkpoint, vocabulary=texts)
    detector = open_detector(loaded, checkpoint, settings.detecting)
    with console.progress("evaluate") as progress:
        result = score(detector, dataset, settings.metric, batch_size=settings.batch, progress=progress)
    report: dict[str, Any] = {"model": model, "data": data, **result.as_dict()}
    if teacher is not None:
        reference, _ = load_model(teacher)
        with console.progress("distortion") as progress:
            drift = distortion(
                loaded, reference.to(detector.device), dataset, detector.vocabulary, size=settings.size, limit=settings.compared,
                batch_size=settings.batch, device=detector.device, progress=progress,
            )  # fmt: skip
        report["distortion"] = drift.as_dict()
        if plots is not None:
            from crqat_fx.plots import write_plots

            report["plots"] = [str(path) for path in write_plots(drift, plots)]
    report["settings"] = _settings(resolved)
    if out is not None:
        with written(out / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
        resolved.write(out / "settings.yaml")
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


@app.command()
def cost(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; or a preset without weights, such as yolo-world-v1-l", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option(help="4-4-8, 8-8-8-int, ... or a YAML file  [default: all float]", show_default=False)
    ] = None,
    vocabulary: Annotated[str, typer.Option(help="how many texts, or a vocabulary .npz")] = "80",
    size: Annotated[int, typer.Option(help="picture size, a multiple of 32")] = 640,
    target: Annotated[str, typer.Option(help="what runs it: ort, or conv-inputs (how the published figures count)")] = "ort",
    as_json: Json = False,
) -> None:
    """Count multiply-accumulates, bit operations and size from the graph: as published, and as an export really runs it."""
    from crqat_fx.checkpoint import load_model
    from crqat_fx.cost import cost as count
    from crqat_fx.cost import format_report, model_on_paper
    from crqat_fx.recipe import recipe_named
    from crqat_fx.vocabulary import Vocabulary

    texts = int(vocabulary) if vocabulary.isdecimal() else len(Vocabulary.load(vocabulary))
    bits = None if recipe is None else recipe_named(recipe)
    counted = count(model_on_paper(model) or load_model(model)[0], bits, texts, size, target)
    if as_json:
        console.show_json({"model": model, "recipe": recipe, **counted.as_json()})
    else:
        console.show(format_report(counted))


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
    warmup: Annotated[int | None, typer.Option(help="steps until the full rate  [default: 3000]", show_default=False)] = None,
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
    from crqat_fx.train import SETTINGS

    flags = _given(
        model=model, version=version, data=data, size=size, texts=texts, pictures=pictures, steps=steps, batch=batch, accumulate=accumulate,
        rate=rate, warmup=warmup, schedule=schedule, precision=precision, device=device, threads=threads, workers=workers, seed=seed,
        log_every=log_every, save_every=save_every,
    )  # fmt: skip
    if resume and config is None and (out / SETTINGS).exists():
        config = out / SETTINGS
    resolved = resolve(PretrainSettings, flags, config)
    with console.progress("pretrain") as progress:
        result = run(resolved.values, out, origins=resolved.origins, progress=progress, resume=resume)
    if as_json:
        console.show_json({**dataclasses.asdict(result), "settings": _settings(resolved)})
    else:
        console.note(f"step {result.steps} after {result.seconds:.0f} s; the averaged weights are {result.model}")
    if result.interrupted:
        raise typer.Exit(130)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for pictures, detections and the stage graph")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="50 validation pictures instead of 500")] = False,
    as_json: Json = False,
) -> None:
    """Run the whole product on what the package carries: the drawn task and its two shipped models."""
    from crqat_fx.demo import RECIPES
    from crqat_fx.demo import demo as run

    with console.progress("demo") as progress:
        report = run(out, pictures=50 if quick else 500, progress=progress)
    if as_json:
        console.show_json(report)
        return
    for title, rows in (
        (f"AP on {report['pictures']} pictures of the drawn task", report["accuracy"]),
        ("cost of an export", report["cost"]),
    ):
        console.show(console.table(title, list(rows[0]), [list(row.values()) for row in rows], digits=2))
    console.note(f"the costs of {', '.join(RECIPES)} are counted on the graph; quantized accuracy comes with training")
    console.note(f"drawn: {out / 'detections'} and {out / 'stages.svg'}")
