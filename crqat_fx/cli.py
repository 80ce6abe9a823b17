"""The command line: each command reads its settings, calls the Python API, and shows what came back.

Torch and everything heavy is imported inside the commands, so that help answers at once.
"""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crqat_fx import __version__, console
from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.recipe import DEFAULT_RECIPE, DEFAULT_TARGET
from crqat_fx.settings import Resolved, resolve

if TYPE_CHECKING:
    from crqat_fx.bench import Operators
    from crqat_fx.checkpoint import Checkpoint
    from crqat_fx.data.samples import EvaluationSet
    from crqat_fx.findings import Study
    from crqat_fx.mixed_recipe import Proposal
    from crqat_fx.models.yolo_world import YoloWorld
    from crqat_fx.noise import Noise
    from crqat_fx.quantize.prepared import Prepared
    from crqat_fx.recipe import QuantRecipe
    from crqat_fx.sensitivity import Sensitivity
    from crqat_fx.train import TrainResult
    from crqat_fx.verify import Rung

SETTINGS = "settings.yaml"  # beside a result, in its folder

app = typer.Typer(
    help="From a published YOLO-World checkpoint to a low-bit model that still knows its classes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "a checkpoint: official .pth, ultralytics .pt, this project's own; or a shipped model of the drawn task: pico-v1, pico-v2"
RUNNABLE_HELP = f"{MODEL_HELP}; or a prepared and calibrated model; or an exported .onnx"
ON_PAPER_HELP = "or a preset without weights, such as yolo-world-v1-l"
Runnable = Annotated[str, typer.Argument(help=RUNNABLE_HELP, show_default=False)]
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings; a flag beats it", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps  [default: cpu]", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="processor threads  [default: the runtime's choice]", show_default=False)]
VocabularyFile = Annotated[Path | None, typer.Option(help="vocabulary .npz, in place of the model's own", show_default=False)]
Raw = Annotated[bool, typer.Option("--raw", "--raw-weights", help="of a trained model the raw weights, not their average")]
TrainTexts = Annotated[int | None, typer.Option(help="texts a picture  [default: 80]", show_default=False)]
DrawnPictures = Annotated[int | None, typer.Option(help="pictures of the drawn task  [default: 8000]", show_default=False)]
Accumulate = Annotated[int | None, typer.Option(help="batches a step  [default: 1]", show_default=False)]
Precision = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16  [default: fp32]", show_default=False)]
Workers = Annotated[int | None, typer.Option(help="processes that read a data.yaml's pictures  [default: 0, none]", show_default=False)]
LogEvery = Annotated[int | None, typer.Option(help="steps between log lines  [default: 20]", show_default=False)]
SaveEvery = Annotated[int | None, typer.Option(help="steps between saves  [default: 500]", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out")]
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


def _tell_study(found: "Study", title: str, out: Path, page: Path, resolved: Resolved[Any], as_json: bool) -> None:
    """The closing table of a study and what it comes to; exits with 1 where a file departs from its model."""
    from crqat_fx.findings import closing_table, turned_table
    from crqat_fx.report_results import verdict

    departed = [model.label for model in found.models if model.ladder is not None and not model.ladder.passed]
    if as_json:
        head, rows = closing_table(found)
        table = [dict(zip(head, row, strict=True)) for row in rows]
        told = {"verdict": verdict(found), "table": table, "departed": departed}
        console.show_json({"out": str(out), **told, "settings": resolved.as_json()})
    else:
        console.show(console.table(title, *turned_table(found)))
        console.note(f"{verdict(found)}\nthe page: {page}")
    if departed:
        console.note(f"a file departs from its model: {', '.join(departed)}")
        raise typer.Exit(1)


def _say_weights(model: str, weights: str) -> None:
    """Of a trained model there are two sets."""
    if weights != "only":
        console.note(f"{model}: the {weights} weights" + ("; --raw-weights takes the raw ones" if weights == "average" else ""))


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
    raw: Raw = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Find the vocabulary's things on pictures; draw them and write COCO-style detections.json.

    A picture that cannot be read is skipped and named; the exit status is then 1.
    """
    from crqat_fx.detect import RESULT, DetectSettings, detect_pictures
    from crqat_fx.model_files import open_model
    from crqat_fx.pictures import find_sources

    sources = find_sources(pictures, without=out)
    opened = open_model(model, raw=raw)
    _say_weights(model, opened.weights)
    flags = _given(
        vocabulary=vocabulary, text=text, conf=conf, iou=iou, max=most, size=size, batch=batch, device=device, threads=threads
    )  # fmt: skip
    resolved = resolve(DetectSettings, flags, config, opened.carried_settings())
    detector = opened.detector(resolved.values)

    def keep_settings() -> None:
        resolved.write(out / SETTINGS, _command("detect", model, *pictures))

    with console.progress("detect") as progress:
        batch_size = resolved.values.batch
        report = detect_pictures(detector, sources, out, batch=batch_size, progress=progress, before_drawing=keep_settings)
    if as_json:
        console.show_json(
            {
                "out": str(out),
                "weights": opened.weights,
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
    stages: Literal[2, 3] = 2  # of a float model; a prepared one has its own
    picture: tuple[str, ...] = ()  # none: drawn ones

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise UserError(f"depth is {self.depth}", remedy="give a number from 1, or 0 for all")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; {ON_PAPER_HELP}; or a prepared model", show_default=False)],
    depth: Annotated[
        int | None,
        typer.Option(
            help="how far to open it: 1 backbone, neck, head (a prepared model's stages); 2 their blocks; 0 all, down to every quantizer  "
            "[default: 2]",
            min=0,
            show_default=False,
        ),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(
            help="draw the graph, its stages in colour, into this .svg; or into this .html, with all there is behind each block",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[
        int | None, typer.Option(help="2: backbone, neck-head; 3: backbone, neck, head  [default: 2]", show_default=False)
    ] = None,
    picture: Annotated[
        list[str] | None,
        typer.Option(
            help="a picture, folder or pattern to measure a prepared model's noise on; may be repeated  [default: 4 drawn ones]",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show what a model is: size, version, parameters, vocabulary, and its blocks with channels and strides.

    Of a prepared model the recipe, the stages, the bits, the ranges and what set them, and the signal to quantization noise of every
    tensor: end to end against the float model, and what each quantizer adds by itself.
    """
    from rich.text import Text
    from rich.tree import Tree

    from crqat_fx.graph_page import DRAWN_AS, save_drawing
    from crqat_fx.graph_view import view
    from crqat_fx.quantize.prepared import Prepared

    if graph is not None and graph.suffix not in DRAWN_AS:
        raise UserError(f"{graph.name} is neither .svg nor .html", where="--graph", remedy="name a file that ends in one of them")
    resolved = resolve(InspectSettings, _given(depth=depth, stages=stages, picture=picture), config)
    settings = resolved.values
    opened = _file_or_preset(model)
    text: Text | Tree
    if isinstance(opened, Prepared):
        from crqat_fx.prepared_inspection import inspect_prepared, kind_of, shown

        if resolved.origins["stages"] == "flag":
            raise UserError("its stages were chosen when it was prepared", where="--stages", remedy="leave it out")
        found = inspect_prepared(opened, model, *_noise_on(opened, settings.picture))
        report, text = found.as_json(), shown(found, settings.depth or None)
        if graph is not None:
            title = f"{Path(model).name}: {kind_of(found)}, for {opened.target.name}"
            save_drawing(view(opened.graph, opened.target), graph, title, found)
    else:
        from crqat_fx.checkpoint import model_of
        from crqat_fx.inspection import inspect_model, title_of, tree
        from crqat_fx.pipelines import mark_stages
        from crqat_fx.trace import trace

        if settings.picture:
            raise UserError("a float model has no quantization noise to measure", where="--picture", remedy="give a prepared model")
        loaded = model_of(opened)
        report = inspect_model(loaded, opened, depth=settings.depth or None)
        text = tree(report)
        if graph is not None:
            traced = trace(loaded)
            mark_stages(settings.stages)(traced)
            save_drawing(view(traced), graph, f"{opened.path.name}: {title_of(report)}")
    if graph is not None:
        resolved.write(_beside(graph), _command("inspect", model))
    if as_json:
        console.show_json(report)
    else:
        console.show(text)
    if graph is not None:
        console.note(f"drawn: {graph}")


def _noise_on(prepared: "Prepared", named: tuple[str, ...]) -> "tuple[Noise | None, str]":
    """A calibrated model's noise on the pictures that are named, or on drawn ones, and what they are called."""
    from crqat_fx.data.shapes import ShapesTask
    from crqat_fx.noise import measure_noise
    from crqat_fx.pictures import count_pictures, find_sources, read_source
    from crqat_fx.prepared_inspection import DRAWN
    from crqat_fx.quantize.calibrate import picture_batches

    if not prepared.calibrated:
        return None, ""
    if named:
        sources = find_sources(named)
        count, told = count_pictures(sources), f"{len(sources)} of {', '.join(named)}"
        pictures = (picture.pixels for source in sources for picture in read_source(source))
    else:
        task = ShapesTask(size=prepared.size)
        count, told = DRAWN, f"{DRAWN} drawn pictures"
        pictures = (task.draw("val", index).image for index in range(DRAWN))
    with console.progress("inspect") as progress:
        return measure_noise(prepared, picture_batches(prepared, pictures, 1), total=count, progress=progress), told


def _file_or_preset(name: str, *, raw: bool = False) -> "Checkpoint | Prepared":
    """What is in a file; of a preset's name such as `yolo-world-v1-s`, a model of that shape with freshly drawn weights. `raw`: of a
    trained one the raw weights, not their average."""
    from crqat_fx.checkpoint import Checkpoint
    from crqat_fx.cost import model_on_paper
    from crqat_fx.model_files import read_model
    from crqat_fx.models.yolo_world import YoloWorld

    on_paper = model_on_paper(name)
    if on_paper is None:
        return read_model(name, raw=raw)
    if raw:
        raise UserError("is a preset, which nothing was trained of", where=name, remedy="leave out --raw-weights")
    model = YoloWorld(on_paper.config).eval()
    return Checkpoint(Path(name), "preset", model.config, model.state_dict())


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
    raw: Raw = False,
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
    from crqat_fx.evaluate import EvaluateSettings
    from crqat_fx.evaluate import evaluate as score
    from crqat_fx.model_files import is_onnx, open_model

    if plots is not None and teacher is None:
        raise UserError("compares with a teacher", where="--plots", remedy="name one with --teacher")
    exported = [name for name in (model, teacher) if name is not None and is_onnx(name)]
    if teacher is not None and exported:
        raise UserError("gives no regions to compare", where=exported[0], remedy="compare the models that files are exported from")
    opened = open_model(model, raw=raw)
    _say_weights(model, opened.weights)
    flags = _given(
        metric=metric, pictures=pictures, vocabulary=vocabulary, conf=conf, iou=iou, max=most, size=size, batch=batch, device=device,
        threads=threads, compared=compared,
    )  # fmt: skip
    resolved = resolve(EvaluateSettings, flags, config, size_of_data(data) | opened.carried_settings())
    settings = resolved.values
    if data != SHAPES and resolved.origins["pictures"] in ("flag", "config") and settings.pictures != EvaluateSettings.pictures:
        raise UserError("means nothing to a data.yaml, which names its own pictures", where="--pictures", remedy="leave it out")
    dataset, texts = open_evaluation(data, settings.size, settings.pictures)
    source = "settings" if settings.vocabulary is not None else "data" if texts is not None and opened.takes_text else "model"
    detector = opened.detector(settings.detecting, texts)
    if resolved.origins["conf"] == "file":
        console.note(f"{model} has NMS in it: scored is what it keeps, above {settings.conf:g} and at most {settings.max} a picture")
    report: dict[str, Any] = {"model": model, "weights": opened.weights, "data": data}
    report["vocabulary"] = {"names": len(detector.names), "from": source}
    if teacher is not None:
        from crqat_fx.distortion import distortion
        from crqat_fx.model_files import load_module
        from crqat_fx.torch_detector import TorchDetector

        assert isinstance(detector, TorchDetector)  # an exported file is refused above
        reference, _ = load_module(teacher)
        with console.progress("distortion") as progress:
            drift = distortion(
                detector.model, reference.to(detector.device), dataset, detector.vocabulary, size=settings.size, limit=settings.compared,
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
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP}; {ON_PAPER_HELP}; or a prepared model", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option(help="4-4-8, 8-8-8-int, ... or a YAML file  [default: a prepared model's, else all float]", show_default=False),
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
    from crqat_fx.cost import cost as count
    from crqat_fx.cost import format_report
    from crqat_fx.recipe import recipe_named

    shape, own, carried = _shape(model)
    resolved = resolve(CostSettings, _given(recipe=recipe, vocabulary=vocabulary, size=size, target=target), config, carried)
    settings = resolved.values
    bits = own if settings.recipe is None else recipe_named(settings.recipe)
    texts = _texts(settings.vocabulary, shape.config.text_width)
    counted = count(shape, bits, texts, settings.size, settings.target)
    if as_json:
        console.show_json({"model": model, "recipe": settings.recipe, **counted.as_json()})
    else:
        console.show(format_report(counted))


def _shape(name: str) -> "tuple[YoloWorld, QuantRecipe | None, dict[str, Any]]":
    """A model to be counted; of a prepared one also its recipe, and what its file says of the settings."""
    import torch

    from crqat_fx.checkpoint import Checkpoint, model_of
    from crqat_fx.cost import model_on_paper
    from crqat_fx.model_files import read_model
    from crqat_fx.models.yolo_world import YoloWorld

    on_paper = model_on_paper(name)
    if on_paper is not None:
        return on_paper, None, {}
    opened = read_model(name)
    if isinstance(opened, Checkpoint):
        return model_of(opened), None, {}
    if opened.config is None:
        raise UserError("is of a module of your own, which is not counted", where=name, remedy="give a YOLO-World")
    with torch.device("meta"):
        model = YoloWorld(opened.config)
    texts = None if opened.vocabulary is None else str(len(opened.vocabulary))
    return model, opened.recipe, {"vocabulary": texts, "size": opened.size, "target": opened.target.name}


def _texts(vocabulary: str, width: int) -> int:
    """How many texts `--vocabulary` means: a number, or a file of that width."""
    from crqat_fx.vocabulary import Vocabulary

    if vocabulary.isdecimal():
        return int(vocabulary)
    loaded = Vocabulary.load(vocabulary)
    loaded.check_width(width, vocabulary)
    return len(loaded)


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of the command `prepare`."""

    recipe: str = DEFAULT_RECIPE
    target: str = DEFAULT_TARGET
    cpu: Literal["any", "vnni"] = "any"
    method: str = "lsq"
    stages: Literal[2, 3] = 2
    vocabulary: Path | None = None  # None takes the model's own
    size: int = 640
    calibrate: str | None = None  # pictures, or shapes; None leaves the quantizers without ranges
    observer: str = "omse"
    pictures: int = 256
    correct_norms: bool = False

    def __post_init__(self) -> None:
        if self.correct_norms and self.calibrate is None:
            raise UserError("norms are corrected on pictures", where="--correct-norms", remedy="name some with --calibrate")


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
    stages: Annotated[
        int | None, typer.Option(help="of a curriculum; 2: backbone, neck-head; 3: backbone, neck, head  [default: 2]", show_default=False)
    ] = None,
    vocabulary: VocabularyFile = None,
    size: PictureSize = None,
    calibrate: Annotated[
        str | None, typer.Option(help="pictures to set the ranges by: a folder, or shapes, the drawn task", show_default=False)
    ] = None,
    observer: Annotated[
        str | None, typer.Option(help="omse, minmax, moving-average, percentile, entropy  [default: omse]", show_default=False)
    ] = None,
    pictures: Annotated[int | None, typer.Option(min=1, help="pictures calibrated on  [default: 256]", show_default=False)] = None,
    correct_norms: Annotated[
        bool | None,
        typer.Option(
            "--correct-norms/--keep-norms",
            help="give quantized layers their channels' float means and deviations back: much AP at 4 bits and fewer, without training",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Put learnable quantizers into a model, where its target wants them, and set their ranges on pictures.

    Shows the passes that ran, the stages, and what stays float and why. `evaluate` and `detect` take the result.
    """
    from crqat_fx.checkpoint import load_model
    from crqat_fx.correct_norms import correct_norms as put_right
    from crqat_fx.data.opening import open_pictures
    from crqat_fx.detect import DetectSettings, open_vocabulary
    from crqat_fx.quantize.calibrate import calibrate as set_ranges
    from crqat_fx.quantize.calibrate import picture_batches
    from crqat_fx.quantize.prepare import prepare as insert
    from crqat_fx.torch_detector import carried_settings

    loaded, checkpoint = load_model(model)
    flags = _given(
        recipe=recipe, target=target, cpu=cpu, method=method, stages=stages, vocabulary=vocabulary, size=size, calibrate=calibrate,
        observer=observer, pictures=pictures, correct_norms=correct_norms,
    )  # fmt: skip
    resolved = resolve(PrepareSettings, flags, config, carried_settings(checkpoint))
    settings = resolved.values
    texts = open_vocabulary(checkpoint.vocabulary, DetectSettings(vocabulary=settings.vocabulary, size=settings.size), checkpoint.path)
    prepared = insert(
        loaded, recipe=settings.recipe, target=settings.target, vocabulary=texts, size=settings.size, cpu=settings.cpu,
        method=settings.method, stages=settings.stages, take_over=True,
    )  # fmt: skip
    corrected = 0
    if settings.calibrate is not None:
        with console.progress("calibrate") as progress:
            batches = picture_batches(prepared, open_pictures(settings.calibrate, settings.size, settings.pictures))
            set_ranges(prepared, batches, settings.observer, settings.pictures, progress=progress)
            if settings.correct_norms:
                batches = picture_batches(prepared, open_pictures(settings.calibrate, settings.size, settings.pictures))
                corrected = put_right(prepared, batches, settings.pictures, progress=progress)
    prepared.save(out)
    resolved.write(_beside(out), _command("prepare", model))
    parts = [
        {"stage": stage.name, "nodes": len(stage.nodes), "modules": sum(node.op == "call_module" for node in stage.nodes),
         "quantizers": len(prepared.quantizers([stage.name]))}
        for stage in prepared.stages
    ]  # fmt: skip
    steps = [{"pass": step.name, "rewrites": step.rewrites, "ms": step.seconds * 1e3} for step in prepared.steps]
    floats = [{"path": path, "why": why} for path, why in prepared.floats()]
    if as_json:
        report = {"out": str(out), "passes": steps, "stages": parts, "float": floats, "calibrated": prepared.calibrated}
        report["corrected"] = corrected
        console.show_json({**report, "settings": resolved.as_json()})
        return
    for title, rows in (("passes", steps), ("stages", parts), ("what stays float", floats)):
        if rows:
            console.show(console.table(title, list(rows[0]), [list(row.values()) for row in rows]))
    console.note(f"prepared: {out}" + ("" if prepared.calibrated else "; give --calibrate to set the ranges of its quantizers"))
    if settings.correct_norms:
        console.note(f"norms corrected: {corrected}" + ("" if corrected else "; no convolution has a norm and a scale for each channel"))


@app.command()
def train(
    prepared: Annotated[Path, typer.Argument(help="a prepared model", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            help="the run's folder: settings.yaml, log.jsonl, quantizers.jsonl, tensorboard/, last.pt, started.pt, prepared.pt",
            show_default=False,
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="the full-precision checkpoint that teaches; all but qat and cqat need it", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(help="a data.yaml; or shapes, the drawn task  [default: shapes]", show_default=False)] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="cr-qat: stage by stage, taught; cqat: stage by stage; kd: taught; qat; cr-qat-plus: cr-qat, norms frozen and corrected, "
            "the rate decaying  [default: cr-qat]",
            show_default=False,
        ),
    ] = None,
    relations: Annotated[
        str | None, typer.Option(help="what TRKD compares: full, region-text, region-region, none  [default: full]", show_default=False)
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(
            help="statistics of the norms that are trained: train or frozen  [default: train, or the method's]", show_default=False
        ),
    ] = None,
    correct_norms: Annotated[
        bool | None,
        typer.Option(
            "--correct-norms/--keep-norms",
            help="give layers their channels' float means and deviations back as they are quantized; with --norm frozen",
            show_default=False,
        ),
    ] = None,
    size: Annotated[int | None, typer.Option(help="picture size  [default: the prepared model's]", show_default=False)] = None,
    texts: TrainTexts = None,
    pictures: DrawnPictures = None,
    steps: Annotated[int | None, typer.Option(help="steps in all  [default: 10000]", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="pictures a batch, over all processes  [default: 16]", show_default=False)] = None,
    accumulate: Accumulate = None,
    rate: Annotated[float | None, typer.Option(help="learning rate  [default: 0.0002]", show_default=False)] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant or linear  [default: constant, or the method's]", show_default=False)
    ] = None,
    precision: Precision = None,
    device: Device = None,
    threads: Threads = None,
    workers: Workers = None,
    seed: Annotated[int | None, typer.Option(help="of the order of the data  [default: 0]", show_default=False)] = None,
    log_every: LogEvery = None,
    save_every: SaveEvery = None,
    ap_pictures: Annotated[
        int | None,
        typer.Option(help="score AP on so many pictures as each phase opens and as it ends  [default: 0, no AP]", show_default=False),
    ] = None,
    resume: Resume = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Train a prepared model: by the published curriculum with its teacher, or by one of its baselines.

    What has no flag (the weights of the losses, the phases themselves) is set by --config; configs/o365_gqa_448.yaml shows all. The result
    holds averaged and raw weights. A stopped or killed run goes on, bit for bit on a CPU, with --resume; Ctrl-C saves first.
    """
    from crqat_fx.qat import QatSettings, train_file
    from crqat_fx.quantize.prepared import read_saved
    from crqat_fx.train import settings_of

    flags = _given(
        teacher=teacher, data=data, method=method, relations=relations, norm=norm, correct_norms=correct_norms, size=size, texts=texts,
        pictures=pictures, steps=steps, batch=batch, accumulate=accumulate, rate=rate, schedule=schedule, precision=precision,
        device=device, threads=threads, workers=workers, seed=seed, log_every=log_every, save_every=save_every, ap_pictures=ap_pictures,
    )  # fmt: skip
    carried = settings_of(out) if resume else {"size": read_saved(prepared).size}
    resolved = resolve(QatSettings, flags, config, carried)
    with console.progress("train") as progress:
        result = train_file(prepared, resolved.values, out, origins=resolved.origins, progress=progress, resume=resume)
    _show_training(result, resolved.as_json(), as_json, "averaged and raw weights are in")


def _show_training(result: "TrainResult", settings: dict[str, Any], as_json: bool, what: str) -> None:
    """What a training left; of several processes the first one tells."""
    if result.first and as_json:
        console.show_json({**dataclasses.asdict(result), "settings": settings})
    elif result.first:
        if result.ap:
            opened, ended = ([line[name] for line in result.ap if name in line] for name in ("ap_opening", "ap"))
            rows = [(number, *pair) for number, pair in enumerate(zip_longest(opened, ended), 1)]
            console.show(console.table("AP", ("phase", "as it opens", "as it ends"), rows))
        console.note(f"step {result.steps} after {result.seconds:.0f} s; {what} {result.model}")
        for deed, counts in (("skipped", result.skipped), ("repaired", result.repaired)):
            if counts:
                console.note(f"{deed}: {', '.join(f'{count} x {kind}' for kind, count in counts.items())}")
    if result.interrupted:
        raise typer.Exit(130)


@dataclass(frozen=True)
class ExportSettings:
    """Settings of the command `export`."""

    form: Literal["straight", "tuned", "fp16"] = "tuned"  # of a checkpoint; of a prepared model its codes are exported
    weights: Literal["int4", "int8"] | None = None  # None: the least that holds the codes
    vocabulary: Path | None = None  # None takes the model's own
    runtime_text: bool = False
    dynamic: str = ""  # batch, size, or both with a comma between
    outputs: Literal["decoded", "raw", "nms"] = "decoded"
    input: Literal["float", "uint8"] = "float"
    size: int = 640
    conf: float = 0.25  # these three of nms
    iou: float = 0.7
    max: int = 300


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(help=f"a prepared or trained model, for its codes; for floats {MODEL_HELP}; {ON_PAPER_HELP}", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="the ONNX file to write")] = Path("model.onnx"),
    weights: Annotated[
        str | None,
        typer.Option(help="how codes of weights are stored: int4, int8  [default: the least that holds them]", show_default=False),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="of a checkpoint: straight, as it is written; tuned, by exact algebra; fp16  [default: tuned]", show_default=False
        ),
    ] = None,
    vocabulary: VocabularyFile = None,
    runtime_text: Annotated[bool, typer.Option("--runtime-text", help="leave the text an input; else the vocabulary is folded in")] = False,
    dynamic: Annotated[
        str | None,
        typer.Option(help="what stays open: batch, size (multiples of 32), or batch,size  [default: neither]", show_default=False),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="put out logits and bins of each level in place of boxes and scores")] = False,
    nms: Annotated[bool, typer.Option("--nms", help="put out detections and their counts in place of boxes and scores")] = False,
    input: Annotated[  # noqa: A002
        str | None, typer.Option("--input", help="float: [B,3,H,W] in [0, 1]; uint8: [B,H,W,3]  [default: float]", show_default=False)
    ] = None,
    raw_weights: Annotated[
        bool, typer.Option("--raw-weights", help="of a trained model export the raw weights, not their average")
    ] = False,
    size: PictureSize = None,
    conf: Annotated[float | None, typer.Option(help="lowest score that --nms keeps  [default: 0.25]", show_default=False)] = None,
    iou: Annotated[float | None, typer.Option(help="overlap above which --nms drops a box  [default: 0.7]", show_default=False)] = None,
    most: Annotated[
        int | None, typer.Option("--max", help="most detections a picture that --nms keeps  [default: 300]", show_default=False)
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX: of a prepared one the integers that onnxruntime runs, of a checkpoint the floats to compare them with.

    Shows what was written, and what of it onnxruntime really computes in integers.
    """
    from crqat_fx.checkpoint import Checkpoint, model_of
    from crqat_fx.coverage import coverage, format_coverage
    from crqat_fx.detections import Selection
    from crqat_fx.export import export as write
    from crqat_fx.quantize.prepared import Prepared
    from crqat_fx.torch_detector import carried_settings
    from crqat_fx.vocabulary import Vocabulary

    if raw and nms:
        raise UserError("--raw and --nms are two kinds of outputs", remedy="give one of them")
    opened = _file_or_preset(model, raw=raw_weights)
    chosen = "only" if isinstance(opened, Checkpoint) else opened.weights
    _say_weights(model, chosen)
    flags = _given(
        form=form, weights=weights, vocabulary=vocabulary, runtime_text=runtime_text or None, dynamic=dynamic,
        outputs="raw" if raw else "nms" if nms else None, input=input, size=size, conf=conf, iou=iou, max=most,
    )  # fmt: skip
    carried = carried_settings(opened) if isinstance(opened, Checkpoint) else {"size": opened.size}
    resolved = resolve(ExportSettings, flags, config, carried)
    settings = resolved.values
    if isinstance(opened, Prepared) and resolved.origins["form"] != "default":
        raise UserError("is a prepared model: its codes are exported, in no form of floats", where="--form", remedy="leave it out")
    texts = opened.vocabulary if settings.vocabulary is None else Vocabulary.load(settings.vocabulary)
    with console.progress("export") as progress:
        written_file = write(
            model_of(opened) if isinstance(opened, Checkpoint) else opened, out, vocabulary=texts, runtime_text=settings.runtime_text,
            form=settings.form, weights=settings.weights, size=settings.size, dynamic=_open_axes(settings.dynamic),
            outputs=settings.outputs, input=settings.input,
            selection=Selection(settings.conf, settings.iou, settings.max), progress=progress,
        )  # fmt: skip
    resolved.write(_beside(out), _command("export", model))
    metadata = written_file.metadata
    covered = coverage(out, size=settings.size)
    if as_json:
        steps = [{"pass": step.name, "rewrites": step.rewrites, "ms": step.seconds * 1e3} for step in written_file.steps]
        report = {"out": str(out), "weights": chosen, "bytes": written_file.size_bytes, "metadata": metadata.as_strings(), "passes": steps}
        console.show_json({**report, "coverage": covered.as_json(), "settings": resolved.as_json()})
        return
    console.show(format_coverage(covered))
    text = f"{len(metadata.names)} names folded in" if metadata.text == "constant" else "text as an input"
    kind = f"weights {metadata.weights}, outputs {metadata.outputs}, input {metadata.input}, {text}"
    console.note(f"{out}: {written_file.size_bytes / 2**20:.2f} MiB, {kind}")


def _open_axes(dynamic: str) -> "tuple[Literal['batch', 'size'], ...]":
    """What `--dynamic` names."""
    named = [name.strip() for name in dynamic.split(",") if name.strip()]
    unknown = [name for name in named if name not in ("batch", "size")]
    if unknown:
        raise UserError(f"{unknown[0]!r} cannot be left open", where="--dynamic", remedy="give batch, size, or batch,size")
    found: tuple[Literal["batch", "size"], ...] = (*(("batch",) if "batch" in named else ()), *(("size",) if "size" in named else ()))
    return found


@dataclass(frozen=True)
class VerifySettings:
    """Settings of the command `verify`."""

    vocabulary: Path | None = None  # None takes the prepared model's own
    count: int = 4  # pictures
    data: str | None = None  # a set, for the AP of both
    pictures: int = 500  # of the drawn task, for the AP
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count is {self.count}", remedy="give at least one picture")


@app.command()
def verify(
    prepared: Annotated[str, typer.Argument(help="the prepared or trained model", show_default=False)],
    model: Annotated[Path, typer.Argument(help="the .onnx that was exported from it", show_default=False)],
    place: Annotated[str, typer.Argument(metavar="PICTURES", help="a folder of pictures, or shapes, the drawn task", show_default=False)],
    count: Annotated[int | None, typer.Option(help="pictures compared  [default: 4]", show_default=False)] = None,
    data: Annotated[
        str | None, typer.Option(help="also compare the AP of both on a data.yaml, or shapes, the drawn task", show_default=False)
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="validation pictures of the drawn task  [default: 500]", show_default=False)
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="vocabulary .npz that was given to export, in place of the model's own", show_default=False)
    ] = None,
    raw: Raw = False,
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Check that an exported file computes what the prepared model does, rung by rung and tensor by tensor.

    The exit status is 1 where a rung fails, and the first tensor that departs is named.
    """
    from crqat_fx.data.opening import open_pictures
    from crqat_fx.quantize.prepare import load_prepared
    from crqat_fx.verify import verify_file
    from crqat_fx.vocabulary import Vocabulary

    flags = _given(count=count, data=data, pictures=pictures, vocabulary=vocabulary, threads=threads)
    resolved = resolve(VerifySettings, flags, config)
    settings = resolved.values
    loaded = load_prepared(prepared, raw=raw)
    _say_weights(prepared, loaded.weights)
    texts = None if settings.vocabulary is None else Vocabulary.load(settings.vocabulary)
    with console.progress("verify") as progress:
        shown = open_pictures(place, loaded.size, settings.count)
        found = verify_file(
            loaded, model, shown, vocabulary=texts, count=settings.count, threads=settings.threads, progress=progress
        )  # fmt: skip
    if settings.data is not None:
        found = dataclasses.replace(found, rungs=(*found.rungs, _accuracy_rung(prepared, model, settings, raw)))
    if as_json:
        console.show_json({"prepared": prepared, "file": str(model), **found.as_dict(), "settings": resolved.as_json()})
    else:
        judged = {True: "holds", False: "FAILS", None: "reported"}
        rows = [(rung.number or "", rung.name, rung.tensors, *rung.steps, judged[rung.passed]) for rung in found.rungs]
        head = ("rung", "compared", "tensors", "equal", "1 off", "2 off", "more", "")
        console.show(console.table(f"{model.name} against {Path(prepared).name}", head, rows))
        for rung in found.rungs:
            if rung.detail and rung.passed is not None:
                console.note(f"{rung.name}: {rung.detail}")
        for why, count in Counter(found.collapsed.values()).items():
            console.note(f"{count} quantizers of the model are not in the file: {why}; --json names them")
    if not found.passed:
        console.note(f"departs first: {found.departs}")
        raise typer.Exit(1)


def _accuracy_rung(prepared: str, model: Path, settings: VerifySettings, raw: bool) -> "Rung":
    """The AP of the prepared model and of the file, on the same set and with the same vocabulary."""
    from crqat_fx.data.opening import open_evaluation
    from crqat_fx.evaluate import EvaluateSettings, evaluate
    from crqat_fx.model_files import open_model
    from crqat_fx.verify import accuracy

    assert settings.data is not None
    kept = open_model(str(model)).carried_settings()  # of a file with NMS also what that keeps: the model is scored by the same
    scores = []
    for name in (prepared, str(model)):
        opened = open_model(name, raw=raw and name == prepared)
        size = int(opened.carried_settings()["size"])
        takes = settings.vocabulary if name == prepared or opened.takes_text else None
        asked = EvaluateSettings(vocabulary=takes, threads=settings.threads, **{**kept, "size": size})
        dataset, texts = open_evaluation(settings.data, size, settings.pictures)
        with console.progress(f"AP of {Path(name).name}") as progress:
            scores.append(evaluate(opened.detector(asked.detecting, texts), dataset, progress=progress).scores.ap)
    return accuracy(*scores)


@dataclass(frozen=True)
class SensitivitySettings:
    """Settings of the command `sensitivity`."""

    pictures: int = 16  # that noise is measured on
    ap_pictures: int = 100  # 0: no AP
    vocabulary: Path | None = None  # in place of the one that the data or the model's file brings
    batch: int = 4
    size_mib: float | None = None  # budgets: one of them asks for a recipe
    bops_t: float | None = None
    counted: Literal["published", "export"] = "published"
    widths: tuple[str, ...] = ("4-4", "4-8", "8-8")
    calibrate: str | None = None  # None: the drawn task's own, with --data shapes
    calibrated_on: int = 256
    observer: str | None = None  # None: what set the model's own ranges
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.size_mib is not None and self.bops_t is not None:
            raise UserError("a recipe is made for one budget", where="--size-mib, --bops-t", remedy="give one of them")
        for name, budget in (("--size-mib", self.size_mib), ("--bops-t", self.bops_t)):
            if budget is not None and not 0 < budget < float("inf"):
                raise UserError(f"a budget of {budget}", where=name, remedy="give a number above 0")
        for name, least in (("pictures", 1), ("ap_pictures", 0), ("batch", 1), ("calibrated_on", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}", remedy=f"give a number from {least}")


@app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(help="a prepared and calibrated model", show_default=False)],
    data: Annotated[str, typer.Option(help="a data.yaml; or shapes, the drawn task", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for sensitivity.json, sensitivity.svg, settings.yaml, and recipe.yaml")] = Path(
        "sensitivity"
    ),
    pictures: Annotated[int | None, typer.Option(help="pictures that noise is measured on  [default: 16]", show_default=False)] = None,
    ap_pictures: Annotated[int | None, typer.Option(help="pictures that AP is scored on  [default: 100]", show_default=False)] = None,
    no_ap: Annotated[bool, typer.Option("--no-ap", help="the noise alone, which takes a fraction of the time")] = False,
    size_mib: Annotated[float | None, typer.Option(help="propose a recipe for a model of at most so many MiB", show_default=False)] = None,
    bops_t: Annotated[float | None, typer.Option(help="or for at most so many tera bit operations a picture", show_default=False)] = None,
    counted: Annotated[
        str | None,
        typer.Option(help="how the budget counts: published, or as the export runs it  [default: published]", show_default=False),
    ] = None,
    widths: Annotated[
        list[str] | None,
        typer.Option(help="weight-activation bits to choose from; may be repeated  [default: 4-4, 4-8, 8-8]", show_default=False),
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="pictures to set the ranges of what is tried by: a folder, or shapes", show_default=False)
    ] = None,
    calibrated_on: Annotated[int | None, typer.Option(help="at most so many of them  [default: 256]", show_default=False)] = None,
    observer: Annotated[str | None, typer.Option(help="what sets them  [default: what set the model's own]", show_default=False)] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="vocabulary .npz, in place of the data's or else the model's own", show_default=False)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="pictures run at once  [default: 4]", show_default=False)] = None,
    device: Device = None,
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Quantize one block at a time, the rest in float, and show what each costs: in signal to quantization noise of detections, and in AP.

    With a budget also propose a recipe, as many bits in every block as the budget bears where they do most: `prepare --recipe` takes it.
    """
    from crqat_fx.data.opening import open_pictures
    from crqat_fx.mixed_recipe import Budget, Widths, propose
    from crqat_fx.plots import write_sensitivity
    from crqat_fx.sensitivity import sensitivity as measure

    flags = _given(
        pictures=pictures, ap_pictures=0 if no_ap else ap_pictures, vocabulary=vocabulary, batch=batch, size_mib=size_mib, bops_t=bops_t,
        counted=counted, widths=widths, calibrate=calibrate, calibrated_on=calibrated_on, observer=observer, device=device, threads=threads,
    )  # fmt: skip
    resolved = resolve(SensitivitySettings, flags, config)
    settings = resolved.values
    of: Literal["size_mib", "bops_t"] = "bops_t" if settings.size_mib is None else "size_mib"
    limit = settings.bops_t if settings.size_mib is None else settings.size_mib
    tried = [Widths.parse(each) for each in settings.widths]
    place = settings.calibrate or (data if data == "shapes" else None)
    if limit is not None and place is None:
        raise UserError("a proposal is calibrated on pictures", where="--calibrate", remedy="name a folder of some like training's")
    prepared, dataset = _measurable(model, data, settings)
    proposal = None  # first, since a budget that cannot be met is told before anything is measured
    if limit is not None and place is not None:
        calibration = place
        with console.progress("proposal") as progress:
            proposal = propose(
                prepared, Budget(limit, of, settings.counted), dataset,
                lambda: open_pictures(calibration, prepared.size, settings.calibrated_on), tried, observer=settings.observer,
                calibrated_on=settings.calibrated_on, pictures=settings.pictures, ap_pictures=settings.ap_pictures, batch=settings.batch,
                progress=progress,
            )  # fmt: skip
    with console.progress("sensitivity") as progress:
        found = measure(
            prepared, dataset, pictures=settings.pictures, ap_pictures=settings.ap_pictures, batch=settings.batch, progress=progress
        )  # fmt: skip
    report: dict[str, Any] = {"model": model, "data": data, **found.as_json()}
    if proposal is not None:
        proposal.recipe.save(out / "recipe.yaml")
        report["proposal"] = {"file": str(out / "recipe.yaml"), **proposal.as_json()}
    with written(out / "sensitivity.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    write_sensitivity(found, out / "sensitivity.svg", proposal)
    resolved.write(out / SETTINGS, _command("sensitivity", model, "--data", data))
    if as_json:
        console.show_json({**report, "settings": resolved.as_json()})
        return
    _show_sensitivity(found, proposal)
    console.note(f"sensitivity.json, sensitivity.svg and settings.yaml are in {out}")
    if proposal is not None:
        console.note(f"prepare by it: crqat-fx prepare MODEL --recipe {out / 'recipe.yaml'} --target {prepared.target.name}")


def _measurable(model: str, data: str, settings: SensitivitySettings) -> "tuple[Prepared, EvaluationSet]":
    """The prepared model, with the vocabulary that it is to be measured under, and the set."""
    import torch

    from crqat_fx.checkpoint import Checkpoint
    from crqat_fx.data.opening import open_evaluation
    from crqat_fx.device import usable_device
    from crqat_fx.evaluate import category_slots
    from crqat_fx.model_files import read_model
    from crqat_fx.vocabulary import Vocabulary

    prepared = read_model(model)
    if isinstance(prepared, Checkpoint):
        raise UserError("is a float model, which no quantizer is in", where=model, remedy="prepare it with `crqat-fx prepare --calibrate`")
    if not prepared.calibrated or prepared.config is None:
        raise UserError("its quantizers have no ranges", where=model, remedy="prepare it again with --calibrate")
    dataset, texts = open_evaluation(data, prepared.size, max(settings.pictures, settings.ap_pictures))
    given = Vocabulary.load(settings.vocabulary) if settings.vocabulary is not None else texts or prepared.vocabulary
    if given is None:
        raise UserError("carries no vocabulary", where=model, remedy="give one with --vocabulary")
    given.check_width(prepared.config.text_width, settings.vocabulary or model)
    if settings.ap_pictures:
        category_slots(given.names, dataset.coco)  # before minutes of measuring
    prepared.vocabulary = given
    prepared.graph.to(usable_device(settings.device))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return prepared, dataset


def _show_sensitivity(found: "Sensitivity", proposal: "Proposal | None") -> None:
    from crqat_fx.graph_picture import short
    from crqat_fx.noise import decibels

    scored, chosen = found.float_ap is not None, {} if proposal is None else proposal.chosen
    head = ("quantized alone", "W", "A", "quantizers", "dB", *(("AP",) if scored else ()), *(("proposed",) if chosen else ()))
    rows: list[tuple[object, ...]] = [
        (short(each.block), *("/".join(map(str, bits)) or "-" for bits in (each.weight_bits, each.activation_bits)), each.quantizers,
         each.db, *((each.ap,) if scored else ()), *((str(chosen.get(each.block, "as it is")),) if chosen else ()))
        for each in found.blocks
    ]  # fmt: skip
    title = f"noise in detections on {found.pictures} pictures" + (f", AP on {found.ap_pictures}" if scored else "")
    console.show(console.table(title, head, rows))
    rows = [("nothing", None, found.float_ap), ("all", decibels(found.share), found.ap)]
    if proposal is not None:
        rows.append((f"the proposal (predicted: {proposal.predicted:.1f})", proposal.measured, proposal.ap))
    console.show(console.table("the whole", ("quantized", "dB", "AP")[: 3 if scored else 2], [row[: 3 if scored else 2] for row in rows]))
    if proposal is not None:
        cost = f"{proposal.cost.size_mib:.2f} MiB, {proposal.cost.bops_t:.3g} T BOPs"
        console.note(f"the proposal costs {cost}, counted as {proposal.budget.counted}")


@app.command()
def pretrain(
    out: Annotated[
        Path, typer.Option(help="the run's folder: settings.yaml, log.jsonl, tensorboard/, last.pt, model.pt", show_default=False)
    ],
    model: Annotated[str | None, typer.Option(help="pico, nano, s, m, l, x, xl  [default: s]", show_default=False)] = None,
    version: Annotated[int | None, typer.Option(help="1 or 2  [default: 1]", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="a data.yaml; or shapes, the drawn task  [default: shapes]", show_default=False)] = None,
    size: Annotated[int | None, typer.Option(help="picture size, a multiple of 32  [default: 640]", show_default=False)] = None,
    texts: TrainTexts = None,
    pictures: DrawnPictures = None,
    steps: Annotated[int | None, typer.Option(help="steps in all  [default: 100000]", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="pictures a batch  [default: 16]", show_default=False)] = None,
    accumulate: Accumulate = None,
    rate: Annotated[float | None, typer.Option(help="learning rate  [default: 0.002]", show_default=False)] = None,
    warmup: Annotated[int | None, typer.Option(help="steps until the full rate  [default: 3% of the steps]", show_default=False)] = None,
    schedule: Annotated[str | None, typer.Option(help="linear or constant  [default: linear]", show_default=False)] = None,
    precision: Precision = None,
    device: Device = None,
    threads: Threads = None,
    workers: Workers = None,
    seed: Annotated[int | None, typer.Option(help="of the weights and the order of the data  [default: 0]", show_default=False)] = None,
    log_every: LogEvery = None,
    save_every: SaveEvery = None,
    resume: Resume = False,
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
    _show_training(result, resolved.as_json(), as_json, "the averaged weights are")


@app.command()
def bench(
    models: Annotated[
        list[Path], typer.Argument(help="exported models, .onnx; the first is what the others are compared with", show_default=False)
    ],
    threads: Annotated[int | None, typer.Option(help="processor threads  [default: 1]", show_default=False)] = None,
    rounds: Annotated[int | None, typer.Option(help="turns that each model gets  [default: 15]", show_default=False)] = None,
    runs: Annotated[int | None, typer.Option(help="runs a turn  [default: 3]", show_default=False)] = None,
    size: Annotated[int | None, typer.Option(help="picture size where a file leaves it open  [default: 640]", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="batch where a file leaves it open  [default: 1]", show_default=False)] = None,
    texts: Annotated[int | None, typer.Option(help="texts where a file leaves them open  [default: 80]", show_default=False)] = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="also show the time by operator and beside the first model's, and what is in integers")
    ] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Time exported models against each other: each in its own process, in turns; medians, with the quartiles around them."""
    from crqat_fx.bench import BenchSettings, format_machine, operators_of
    from crqat_fx.bench import bench as run
    from crqat_fx.coverage import format_coverage
    from crqat_fx.work import by_work

    flags = _given(threads=threads, rounds=rounds, runs=runs, size=size, batch=batch, texts=texts)
    resolved = resolve(BenchSettings, flags, config)
    with console.progress("bench") as progress:
        report = run(models, resolved.values, progress)
    details = [operators_of(model, resolved.values) for model in models] if operators else []
    if as_json:
        work = [one.as_json() for one in by_work([each.times for each in details])] if details else []
        described = {"operators": [one.as_json() for one in details], "work": work}
        console.show_json({**report.as_json(), **described, "settings": resolved.as_json()})
        return
    first = report.timings[0]
    rows = [(one.name, one.bytes / 2**20, f"{one.milliseconds:.1f}", f"{one.times_faster_than(first):.2f}") for one in report.timings]
    console.show(console.table("time of one run", ("model", "MiB", "ms", "times as fast as the first"), rows, digits=2))
    for each in details:
        lines = [(one.kind, one.nodes, one.macs / 1e9, one.milliseconds) for one in each.times]
        console.show(console.table(str(each.path), ("operator", "nodes", "MACs G", "ms"), lines, digits=2))
        console.show(format_coverage(each.coverage))
    for one in details[1:]:
        _show_work(details[0], one)
    console.note(f"medians and quartiles; threads {report.settings.threads}; {format_machine(report.machine)}")


def _show_work(first: "Operators", other: "Operators") -> None:
    """Two files side by side, by kind of work."""
    from crqat_fx.work import by_work

    rows = []
    for one in by_work([first.times, other.times]):
        ratio = one.times_faster(1)
        rows.append((one.name, *one.milliseconds, "" if ratio is None else f"{ratio:.2f}", one.above_ceiling(1)))
    head = ("work", f"ms of {first.path.name}", f"ms of {other.path.name}", "times as fast", "ms above a quarter")
    console.show(console.table("where the time goes, by the profiler", head, rows, digits=2))


@app.command()
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="a training run's folder; or a study that was measured: its study.json, or the folder of that", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="the page to write; study.json and the settings go beside it")] = Path("report.html"),
    data: Annotated[
        str | None, typer.Option(help="a data.yaml, or shapes, to measure on  [default: the run's own]", show_default=False)
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="the float model to compare with  [default: the run's own teacher]", show_default=False)
    ] = None,
    metric: Annotated[str | None, typer.Option(help="of AP: coco or lvis-fixed  [default: coco]", show_default=False)] = None,
    pictures: Annotated[
        int | None, typer.Option(help="pictures for AP, 0 for none  [default: all; of the drawn task 500]", show_default=False)
    ] = None,
    compared: Annotated[int | None, typer.Option(help="pictures for drift, 0 for none  [default: 64]", show_default=False)] = None,
    noise: Annotated[
        int | None, typer.Option(help="pictures that quantizers are watched on, 0 for none  [default: 4]", show_default=False)
    ] = None,
    shown: Annotated[int | None, typer.Option(help="pictures with boxes  [default: 4]", show_default=False)] = None,
    conf: Annotated[float | None, typer.Option(help="lowest score of a box  [default: 0.3]", show_default=False)] = None,
    verified: Annotated[int | None, typer.Option(help="pictures of the ladder, 0 for none  [default: 1]", show_default=False)] = None,
    rounds: Annotated[
        int | None, typer.Option(help="turns that speed is measured in, 0 for none  [default: 15]", show_default=False)
    ] = None,
    operators: Annotated[
        int | None, typer.Option(help="runs for the time by operator, 0 for none  [default: 10]", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="less of each, where nothing else is said")] = False,
    no_export: Annotated[bool, typer.Option("--no-export", help="without what is measured of exported files")] = False,
    batch: Annotated[int | None, typer.Option(help="pictures run at once  [default: 8]", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="of what is timed  [default: 1]", show_default=False)] = None,
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure the models of a training run side by side, and show all that was found in one HTML page that needs no network.

    Compared are the teacher in floats, the model that the run began with, and what it came to; each is exported for what is measured of
    files. A study that was measured, by this or by `demo`, is drawn again. The exit status is 1 where an exported file departs from its
    model.
    """
    from crqat_fx.findings import STUDY, load_study
    from crqat_fx.report import write_report
    from crqat_fx.run_study import QUICK, RunStudySettings, is_run, study_run

    flags = _given(
        data=data, teacher=teacher, metric=metric, pictures=pictures, compared=compared, noise=noise, shown=shown, conf=conf,
        verified=verified, rounds=rounds, operators=operators, export=False if no_export else None, batch=batch, threads=threads,
        device=device,
    )  # fmt: skip
    if out.suffix != ".html":
        raise UserError(f"{out.name} is no .html", where="--out", remedy="name a file that ends in it")
    measured = not is_run(run)
    given = next(iter(flags), "quick" if quick else None if config is None else "config")
    if measured and given is not None:
        option = "no-export" if given == "export" else given
        what = "was measured already, or is no training run" if run.exists() else "is not there"
        raise UserError(what, where=run, remedy=f"leave out --{option}, or name a run's folder")
    resolved = resolve(RunStudySettings, flags, config, QUICK if quick else None)
    with written(out) as temporary:  # first of all: a path that cannot be written is told before the work is done
        if measured:
            found = load_study(run / STUDY if run.is_dir() else run)
        else:
            with console.progress("report") as progress:
                found = study_run(run, resolved.values, progress=progress)
            found.save(out.parent / STUDY)
            resolved.write(_beside(out), _command("report", run))
        write_report(found, temporary)
    _tell_study(found, found.title, out, out, resolved, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the models, study.json and report.html; an earlier demo's make way")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="steps of each training  [default: 240]", show_default=False)] = None,
    pictures: Annotated[int | None, typer.Option(help="pictures that AP is measured on  [default: 500]", show_default=False)] = None,
    rounds: Annotated[int | None, typer.Option(help="turns of the bench  [default: 9]", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a tenth of the training and fewer pictures, to see it work")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Run the whole product on what the package carries: the shipped v2 model and the drawn task.

    It is calibrated, trained by CR-QAT, exported as int4, verified, scored and timed in onnxruntime, in several recipes; a table and a
    report compare them. The exit status is 1 where a file departs from its model.
    """
    from crqat_fx.demo import REPORT, DemoSettings, QuickSettings
    from crqat_fx.demo import demo as run

    resolved = resolve(QuickSettings if quick else DemoSettings, _given(steps=steps, pictures=pictures, rounds=rounds), config)
    settings = resolved.values
    found = run(out, settings, console.deed)
    resolved.write(out / SETTINGS, _command("demo", *(("--quick",) if quick else ())))
    trained = f"{'quick, not to judge by: ' if quick else ''}{settings.steps} steps of training, {settings.pictures} pictures"
    _tell_study(found, f"{found.title} ({trained})", out, out / REPORT, resolved, as_json)
