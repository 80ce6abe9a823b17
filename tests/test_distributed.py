"""Two processes against one with the whole batch: sums, norms, losses, gradients. `test_train_command.py` has a whole run of two."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_qat import SETTINGS, fresh, prepared_file, teacher
from test_train import Rectangles
from torch import Tensor, nn

from crqat_fx.data.batch import Batch, Truth, slots_of
from crqat_fx.distributed import ALONE, Processes, joined, own_device, synchronise_norms
from crqat_fx.errors import UserError
from crqat_fx.qat import QatCourse, QatSettings
from crqat_fx.train import TrainingState, accumulate_gradients, take_step

CPU = torch.device("cpu")
KD = replace(SETTINGS, method="kd", batch=4, kd_weight=6.0, trkd_factor=16.0)


class Parts(Rectangles):
    """A part of the batches of four."""

    def __init__(self) -> None:
        super().__init__(4)

    def batches(self, start_step: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        for batch in super().batches(start_step):
            rows = slice(slots_of(part, 4).start, slots_of(part, 4).stop)
            truth = Truth(*(getattr(batch.truth, name)[rows] for name in ("boxes", "labels", "valid")))
            yield Batch(batch.images[rows], batch.text[rows], truth)


def gradients(file: Path, processes: Processes, norm: str, accumulate: int) -> dict[str, Any]:
    """Loss terms and gradients of a step of everything at once, at boxes that overlap the truth."""
    prepared = fresh(file)
    settings = replace(KD, norm=norm)
    course = QatCourse(prepared, settings, Parts(), CPU, processes, teacher())
    state = TrainingState(course, CPU, "rectangles", processes)
    course.open(state)
    stream = Parts().batches(5, processes.part)
    terms = accumulate_gradients(state, [next(stream) for _ in range(accumulate)])
    grads = {name: parameter.grad for name, parameter in prepared.graph.named_parameters() if parameter.grad is not None}
    statistics = {name: value for name, value in prepared.graph.state_dict().items() if "running" in name}
    return {"terms": terms, "gradients": grads, "statistics": statistics}


def partly_quantized(file: Path, processes: Processes) -> dict[str, Tensor]:
    """Losses of the second of two steps in which the neck and head learn in floats, their scales read by nobody."""
    phase = {"quantized": ["backbone"], "trained": ["backbone", "neck-head"]}
    settings = replace(KD, norm="frozen", rate=1e-6, phases=(phase | {"norm": "frozen"},))
    course = QatCourse(fresh(file), settings, Parts(), CPU, processes)
    state = TrainingState(course, CPU, "rectangles", processes)
    course.open(state)
    stream = Parts().batches(5, processes.part)
    return [take_step(state, [next(stream)]) for _ in range(2)][-1]


def together(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, those of scales and of zero points as one each: a scale's is a sum of thousands of numbers that nearly cancel."""
    kinds: dict[str, list[Tensor]] = {"log_scale": [], "zero_point": []}
    for name, gradient in gradients.items():
        kinds.get(name.rpartition(".")[2], []).append(gradient.flatten())
    rest = {name: gradient for name, gradient in gradients.items() if name.rpartition(".")[2] not in kinds}
    return rest | {kind: torch.cat(listed) for kind, listed in kinds.items()}


def totals(processes: Processes) -> dict[str, Tensor]:
    """The sum over processes of x^2 of each, and what its square pulls at x with."""
    x = torch.tensor([1.0, 2.0]) * (processes.rank + 1)
    x.requires_grad_()
    total = processes.total(x.square())
    total.square().sum().backward()
    return {"total": total.detach(), "gradient": x.grad}


def normalised(processes: Processes, momentum: float | None) -> dict[str, Tensor]:
    """Two steps of a norm, of which each process sees its rows."""
    norm = nn.BatchNorm2d(3, momentum=momentum)
    synchronise_norms(norm, processes)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for step in range(2):
        x = 3 * torch.randn(4, 3, 5, 2, generator=generator) + 2
        x = x[slots_of(processes.part, 4).start : slots_of(processes.part, 4).stop].clone().requires_grad_()
        y = norm(x)
        (y * torch.arange(y.shape[1] * 10).view(1, 3, 5, 2)).square().sum().backward()
        found |= {f"y{step}": y.detach(), f"x{step}": x.grad}
    weight = processes.total(norm.weight.grad)
    return found | {"weight": weight, "mean": norm.running_mean, "variance": norm.running_var, "tracked": norm.num_batches_tracked}


def everything(processes: Processes, file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"totals": totals(processes)}
    for momentum in (0.1, None):
        found[f"norm {momentum}"] = normalised(processes, momentum)
    for norm, accumulate in (("frozen", 1), ("train", 1), ("frozen", 2)):
        found[f"{norm} {accumulate}"] = gradients(file, processes, norm, accumulate)
    found["partly quantized"] = partly_quantized(file, processes)
    return found


def work(rank: int, port: int, file: Path, folder: Path) -> None:
    """What each of the two processes does, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined("cpu") as processes:
        found = everything(processes, file)
        torch.save(found, folder / f"found{rank}.pt")
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process finds, and what each of two finds."""
    folder = tmp_path_factory.mktemp("distributed")
    file = prepared_file(folder / "p.pt")
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port = asked.getsockname()[1]
    mp.spawn(work, (port, file, folder), nprocs=2)
    alone = everything(ALONE, file)
    return alone, [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


def test_two_processes_train_what_a_phase_leaves_in_floats(both: Any) -> None:
    alone, found = both
    for name, term in alone["partly quantized"].items():
        assert found[0]["partly quantized"][name].item() == pytest.approx(term.item(), rel=1e-3), name


def test_a_total_is_the_same_everywhere_and_its_gradient_that_of_all_processes(both: Any) -> None:
    _, found = both
    for rank, one in enumerate(found):
        x = torch.tensor([1.0, 2.0]) * (rank + 1)
        total = torch.tensor([1.0, 4.0]) * 5
        assert torch.equal(one["totals"]["total"], total)
        assert torch.equal(one["totals"]["gradient"], 2 * (2 * total) * 2 * x)  # both processes square the total


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_norm_sees_the_statistics_of_all_processes(both: Any, momentum: float | None) -> None:
    alone, found = both
    wanted = alone[f"norm {momentum}"]
    parts = [one[f"norm {momentum}"] for one in found]
    for name in ("y0", "x0", "y1", "x1"):
        joined_parts = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined_parts, wanted[name], rtol=1e-4, atol=1e-4 * wanted[name].abs().max().item())
    for part in parts:
        for name in ("mean", "variance", "weight", "tracked"):
            torch.testing.assert_close(part[name], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("norm", "accumulate", "tolerance"), [("frozen", 1, 1e-4), ("train", 1, 1e-3)])
def test_two_processes_have_the_losses_and_gradients_of_one_with_the_whole_batch(
    both: Any, norm: str, accumulate: int, tolerance: float
) -> None:
    alone, found = both
    wanted = alone[f"{norm} {accumulate}"]
    assert {"cls", "box", "dfl", "pkd", "trkd"} == wanted["terms"].keys()
    for part in (one[f"{norm} {accumulate}"] for one in found):
        for name, term in wanted["terms"].items():
            assert part["terms"][name].item() == pytest.approx(term.item(), rel=tolerance), name
        assert part["gradients"].keys() == wanted["gradients"].keys()
        found_together, wanted_together = together(part["gradients"]), together(wanted["gradients"])
        for name, gradient in wanted_together.items():
            difference = (found_together[name] - gradient).norm().item()
            assert difference <= tolerance * gradient.norm().item() + 1e-6, name
        for name, value in wanted["statistics"].items():
            torch.testing.assert_close(part["statistics"][name], value, rtol=tolerance, atol=tolerance * 1e-2)


def test_accumulated_parts_count_as_the_whole_batches_would(both: Any) -> None:
    """PKD's moments are of one batch, so that only what is a sum over pictures, or groups, is compared."""
    alone, found = both
    for part in found:
        for name in ("cls", "box", "dfl", "pkd", "trkd"):
            assert part["frozen 2"]["terms"][name].item() == pytest.approx(alone["frozen 2"]["terms"][name].item(), rel=1e-4)


def test_outside_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as processes:
        assert processes == ALONE
    assert not dist.is_initialized()
    value = torch.ones(3)
    assert ALONE.total(value) is value
    assert ALONE.parallel(nn.Linear(1, 1), CPU).weight.shape == (1, 1)


def test_an_environment_that_torchrun_did_not_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"), joined("cpu"):
        pass


def test_each_process_of_a_machine_takes_its_own_gpu() -> None:
    assert own_device("cuda", Processes(5, 8, 1)) == "cuda:1"
    assert own_device("cuda", ALONE) == "cuda"
    assert own_device("cpu", Processes(1, 2, 1)) == "cpu"


def test_a_batch_that_cannot_be_shared_equally_is_refused() -> None:
    assert [list(slots_of((rank, 2), 6)) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="no 4 equal parts"):
        slots_of((0, 4), 6)
    assert QatSettings(batch=6).batch == 6
