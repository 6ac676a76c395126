"""Checkpoints: what is saved comes back to the last bit, on any ranks, after any accident."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.checkpoint import CheckpointConfig, Checkpoints, read_manifest, teacher_state, write_teacher
from tests.pretrain.ranks import PROCESSES, Run, run_ranks

CONFIG = CheckpointConfig(every_steps=2, keep_last=2)


def checkpoints(folder: Path, **changes: Any) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(**({"every_steps": 1, "keep_last": 2} | changes)))


def save_now(folder: Path, state: dict[str, Any], step: int = 1, **meta: Any) -> Path:
    store = checkpoints(folder)
    store.save(state, step, meta)
    store.wait()
    latest = store.latest()
    assert latest is not None
    return latest


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class Small(nn.Module):
    """A parameter, a matrix, a scalar and buffers of other types."""

    def __init__(self, rows: int = 5) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(rows, 3)), nn.Parameter(torch.randn(()))
        self.register_buffer("center", torch.randn(7).bfloat16())
        self.register_buffer("seen", torch.tensor([True, False, True]))
        self.register_buffer("count", torch.tensor(12))
        self.register_buffer("empty", torch.zeros(0, 4))


# One process


def test_training_continues_to_the_last_bit(tmp_path: Path) -> None:
    undisturbed = Run("single")
    expected = [undisturbed.step(step) for step in range(5)]
    first = Run("single")
    for step in range(2):
        first.step(step)
    path = save_now(tmp_path, first.state(), 2, phase="low", seed=3)
    second = Run("single")
    assert checkpoints(tmp_path).load(path, second.state()) == {"phase": "low", "seed": 3}
    assert [second.step(step) for step in range(2, 5)] == expected[2:]
    assert_same(second.tensors(), undisturbed.tensors())


def test_every_type_comes_back_and_nothing_is_pickled(tmp_path: Path) -> None:
    saved, loaded = Small(), Small()
    steps = torch.arange(4)
    path = save_now(tmp_path, {"model": saved, "steps": steps})
    found = torch.zeros(4, dtype=torch.int64)
    checkpoints(tmp_path).load(path, {"model": loaded, "steps": found})
    assert_same(loaded.state_dict(), saved.state_dict())
    assert torch.equal(found, steps)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    # The file is what safetensors' own reader expects.
    with safe_open(path / "rank-00000-of-00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.weight"), saved.weight.detach())


def test_later_steps_do_not_reach_a_checkpoint_in_writing(tmp_path: Path) -> None:
    big = {"big": torch.ones(4_000_000)}
    store = checkpoints(tmp_path)
    store.save(big, 1, {})
    big["big"].fill_(-1.0)  # while 16 MB are hashed and written
    store.wait()
    path = store.latest()
    assert path is not None
    store.load(path, big)
    assert (big["big"] == 1.0).all()


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    path = save_now(tmp_path, {"student": Small(), "teacher": Small()})
    teacher = Small()
    checkpoints(tmp_path).load(path, {"teacher": teacher})
    assert_same(teacher_state(path), teacher.state_dict())
    with pytest.raises(ValueError, match=r"holds nothing named gram\.\*; it has student\.\*, teacher\.\*"):
        teacher_state(path, "gram.")


def test_written_teacher_is_a_safetensors_file(tmp_path: Path) -> None:
    state = Small().state_dict()
    write_teacher(tmp_path / "teacher", state, {"architecture": "tiny"})
    write_teacher(tmp_path / "teacher", state, {"architecture": "tiny", "step": 3})
    written = load_file(tmp_path / "teacher" / "teacher.safetensors")
    assert_same({name: written[name] for name in state}, state)
    assert json.loads((tmp_path / "teacher" / "config.json").read_text())["step"] == 3
    assert sorted(file.name for file in (tmp_path / "teacher").iterdir()) == ["config.json", "teacher.safetensors"]


def test_the_newest_and_every_so_many_stay(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=2, keep_every_steps=4)
    for step in range(1, 8):
        store.save({"x": torch.tensor(step)}, step, {})
    store.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006", "step-00000007"]


def test_a_checkpoint_with_someone_s_files_in_it_stays(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=1)
    for step in range(1, 4):
        store.save({"x": torch.tensor(step)}, step, {})
        store.wait()
        if step == 1:
            (tmp_path / "step-00000001" / "notes.txt").write_text("the one for the paper")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert teacher_state(tmp_path / "step-00000001", "x") == {"": torch.tensor(1)}


def test_saving_a_step_twice_writes_it_once(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    for value in (1.0, 2.0):
        store.save({"x": torch.tensor(value)}, 3, {})
    store.wait()
    assert teacher_state(tmp_path / "step-00000003", "x") == {"": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="is not of this run; resume from it"):
        checkpoints(tmp_path).save({"x": torch.tensor(1.0)}, 3, {})


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_told(tmp_path: Path, asynchronous: bool) -> None:
    folder = tmp_path / "run"
    store = checkpoints(folder, asynchronous=asynchronous)
    folder.write_text("in the way")
    steps = iter([1, 2])

    def save_next() -> None:
        store.save({"x": torch.ones(3)}, next(steps), {})

    if asynchronous:
        save_next()  # the error is that of the background, and comes with the next call
    with pytest.raises(RuntimeError, match="checkpoint 1 was not written: a file stands where a folder is needed"):
        save_next()
    folder.unlink()
    store.save({"x": torch.ones(3)}, 3, {})
    store.wait()
    assert store.latest() == folder / "step-00000003"


def test_leavings_are_removed_and_never_loaded(tmp_path: Path) -> None:
    path = save_now(tmp_path, {"x": torch.ones(3)}, 5)
    shutil.copytree(path, tmp_path / ".writing-step-00000006-abcd")
    (tmp_path / "step-00000009").mkdir()  # no manifest: not ours to remove, and no checkpoint
    (tmp_path / ".writing-step-00000007-beef").mkdir()
    (tmp_path / ".writing-step-00000007-beef" / "thesis.txt").write_text("someone's")
    (tmp_path / ".writing-novel").mkdir()
    store = checkpoints(tmp_path)
    assert store.latest() == path
    assert (tmp_path / ".writing-step-00000006-abcd").exists(), "who only looks changes nothing"
    store.clean()
    theirs = [".writing-novel", ".writing-step-00000007-beef"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*theirs, "step-00000005", "step-00000009"]
    assert checkpoints(tmp_path / "none").latest() is None


# Wrong input


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"model": nn.Linear(3, 2, bias=False)}, r"lacks model\.bias\.$"),
        ({"model": nn.Linear(3, 2), "other": nn.Linear(3, 2)}, None),
        ({"model": nn.Sequential(nn.Linear(3, 2))}, r"lacks model\.weight, model\.bias\.$"),
        (
            {"model": nn.Linear(4, 2)},
            r"weight is torch\.float32 \[2, 4\] there and torch\.float32 \[2, 3\] here",
        ),
        ({"model": nn.Linear(3, 2).bfloat16()}, r"model\.weight is torch\.bfloat16 \[2, 3\] there"),
    ],
)
def test_another_model_is_named(tmp_path: Path, saved: dict[str, nn.Module], message: str | None) -> None:
    path = save_now(tmp_path, saved)
    store, state = checkpoints(tmp_path), {"model": nn.Linear(3, 2)}
    if message is None:
        store.load(path, state)
        with pytest.raises(ValueError, match=r"has model\.bias, which this one has not"):
            store.load(path, {"model": nn.Linear(3, 2, bias=False)})
    else:
        with pytest.raises(ValueError, match=message):
            store.load(path, state)


def damage(path: Path, kind: str) -> None:
    file = path / "rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    if kind == "a byte of a tensor":
        content[-1] ^= 1
    elif kind == "a byte of the header":
        content[60] ^= 1
    elif kind == "its end":
        content = content[:-1]
    file.write_bytes(content)
    if kind == "the file":
        file.unlink()
    if kind == "the manifest":
        (path / "manifest.json").write_text("{")


@pytest.mark.parametrize("kind", ["a byte of a tensor", "a byte of the header", "its end", "the file", "the manifest"])
def test_damage_is_found(tmp_path: Path, kind: str) -> None:
    path = save_now(tmp_path, {"model": Small()})
    damage(path, kind)
    with pytest.raises(ValueError, match="damaged"):
        checkpoints(tmp_path).load(path, {"model": Small()})
    with pytest.raises(ValueError, match="damaged"):
        teacher_state(path, "model.")


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="is not of the format"):
        read_manifest(tmp_path)


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last=0 must be 1 or more"):
        CheckpointConfig(keep_last=0)


# Kill


def save_forever(folder: Path) -> None:
    """Checkpoints of 2 MB in which every number is the step, as fast as they go."""
    torch.set_num_threads(1)
    store = checkpoints(folder)
    store.clean()
    latest = store.latest()
    step = 0 if latest is None else read_manifest(latest)["step"]
    tensors = {f"x{i}": torch.empty(64, 1024) for i in range(8)}
    if latest is not None:
        store.load(latest, tensors)
    while True:
        step += 1
        for tensor in tensors.values():
            tensor.fill_(step)
        store.save(tensors, step, {"step": step})


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    randomness = random.Random(5)
    last = 0
    for _ in range(8):
        process = PROCESSES.Process(target=save_forever, args=(tmp_path,), daemon=True)
        process.start()
        end = time.monotonic() + 60
        while not (tmp_path / f"step-{last + 2:08d}").exists() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(randomness.uniform(0, 0.15))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, "it ended by itself, so a checkpoint did not load"
        store = checkpoints(tmp_path)
        store.clean()
        latest = store.latest()
        assert latest is not None
        tensors = {f"x{i}": torch.empty(64, 1024) for i in range(8)}
        step = store.load(latest, tensors)["step"]
        assert step >= last + 2
        assert all((tensor == step).all() for tensor in tensors.values())
        assert len(list(tmp_path.iterdir())) <= 3, "leavings of the killed process"
        last = step


# Several ranks


def train_and_save(folder: Path) -> dict[str, Any]:
    """Two steps and a checkpoint in each mode, then two more; the second time from the checkpoint."""
    result = {}
    for mode in ("fsdp", "ddp"):
        store = Checkpoints(folder / mode, CONFIG)
        run = Run(mode)
        for step in range(2):
            run.step(step)
        store.save(run.state(), 2, {"mode": mode})
        saved = run.tensors()
        undisturbed = [run.step(step) for step in range(2, 4)]
        expected = run.tensors()
        store.wait()
        again = Run(mode)
        path = store.latest()
        assert path is not None
        store.load(path, again.state())
        resumed = [again.step(step) for step in range(2, 4)]
        found = again.tensors()
        result[mode] = {
            "saved": saved,
            "bitwise": undisturbed == resumed and all(torch.equal(found[name], t) for name, t in expected.items()),
            "history": undisturbed,
        }
    return result


def load_elsewhere(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What each mode here finds in the checkpoint of the other mode."""
    result = {}
    for mode, saved_by in (("fsdp", "ddp"), ("ddp", "fsdp")):
        run = Run(mode)
        store = Checkpoints(folder / saved_by, CONFIG)
        path = store.latest()
        assert path is not None
        store.load(path, run.state())
        result[saved_by] = run.tensors()
    return result


def meet_an_error(folder: Path) -> list[str]:
    """One rank's file is damaged: both ranks are told, none waits for the other."""
    store = Checkpoints(folder / "fsdp", CONFIG)
    path = store.latest()
    assert path is not None
    texts = []
    try:
        store.load(path, Run("fsdp").state())
    except ValueError as error:
        texts.append(str(error))
    return texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(train_and_save, tmp_path_factory.mktemp("ranks"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_two_ranks_continue_to_the_last_bit(trained: Any, mode: str) -> None:
    assert all(rank[mode]["bitwise"] for rank in trained[1])


@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_one_process_reads_what_two_ranks_wrote(trained: Any, mode: str) -> None:
    folder, ranks = trained
    path = folder / mode / "step-00000002"
    assert len(list(path.glob("*.safetensors"))) == 2
    run = Run("single")
    assert checkpoints(folder / mode).load(path, run.state()) == {"mode": mode}
    assert_same(run.tensors(), ranks[0][mode]["saved"])
    for step, expected in enumerate(ranks[0][mode]["history"], start=2):
        assert run.step(step) == pytest.approx(expected, rel=1e-4, abs=1e-5)  # sums in another order
    teacher = {n.removeprefix("teacher."): t for n, t in ranks[0][mode]["saved"].items() if n.startswith("teacher.")}
    assert_same(dict(sorted(teacher_state(path).items())), dict(sorted(teacher.items())))


@pytest.mark.slow
def test_three_ranks_read_what_two_wrote_in_the_other_mode(trained: Any, tmp_path: Path) -> None:
    """Twelve rows split into 6 + 6 and 4 + 4 + 4, ten into 5 + 5 and 4 + 4 + 2, one into 1 + 0 and 1 + 0 + 0."""
    folder, ranks = trained
    for found in run_ranks(load_elsewhere, tmp_path, folder, num_ranks=3):
        for saved_by, tensors in found.items():
            assert_same(tensors, ranks[0][saved_by]["saved"])


@pytest.mark.slow
def test_all_ranks_hear_of_one_rank_s_error(trained: Any, tmp_path: Path) -> None:
    shutil.copytree(trained[0] / "fsdp", tmp_path / "fsdp")
    file = tmp_path / "fsdp" / "step-00000002" / "rank-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    first, second = run_ranks(meet_an_error, tmp_path / "ranks", tmp_path)
    assert first == second
    assert "rank-00001-of-00002.safetensors is damaged" in first[0]
