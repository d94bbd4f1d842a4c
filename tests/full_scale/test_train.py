"""The whole command: what it leaves behind, and that no way of stopping it loses a step."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import full_scale.train as entry
from full_scale import checkpoint
from full_scale.metrics import Record, read_metrics
from full_scale.stopping import graceful, only_one
from full_scale.train import run_folder, train
from full_scale.trainer import Step, Trainer
from mutransfer.bundle import Bundle
from mutransfer.errors import UserError

ROOT = Path(__file__).parents[2]

Files = Callable[..., tuple[Path, Path]]


@pytest.fixture
def run(files: Files, tmp_path: Path) -> Callable[..., Path | None]:
    """Trains into `tmp_path/<out>`; keywords change the recipe."""

    def start(out: str, **change: Any) -> Path | None:
        return train(*files(**change), out=tmp_path / out, data_folder=tmp_path / "data",
                     accept_unverified=True)  # fmt: skip

    return start


def final(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    path = checkpoint.found(folder / "checkpoints")[-1]
    assert checkpoint.verify(path) is None
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")


def record(folder: Path) -> list[Record]:
    """The run's record without what depends on the clock."""
    lines = read_metrics(folder)
    for line in lines:
        for name in ("tokens_per_s", "mfu", "phase_seconds_left", "data_wait"):
            line.pop(name, None)
    return lines


def same_end(left: Path, right: Path) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(final(left), final(right), strict=True)
    )


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, number_of_signal: int) -> None:
    """Sends the process a signal in the middle of one step."""
    original = Trainer.train_step

    def step(self: Trainer, *, measure: bool = False) -> Step:
        if self.step + 1 == number:
            os.kill(os.getpid(), number_of_signal)
        return original(self, measure=measure)

    monkeypatch.setattr(Trainer, "train_step", step)


def test_a_run_leaves_its_result_behind(
    run: Callable[..., Path | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("whole")
    assert folder == tmp_path / "whole"
    printed = capsys.readouterr().out
    for part in (
        "decay: 4 steps × 4 sequences × 16 tokens, lr/peak 1 → 0.25 (wsd_exponential), muon",
        "hand-over at step 10",
        "held-out loss",
        "accepted unverified",
    ):
        assert part in printed
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert content["steps"] == 16
    assert content["tokens"] == 1408
    assert content["skipped_steps"] == 0
    assert content["conversions"] == []
    assert [phase["name"] for phase in content["phases"]] == [
        "warmup", "stable", "bigger", "decay", "long",
    ]  # fmt: skip
    assert content["heldout_loss"] == content["phases"][-1]["heldout_loss"] < math.log(256)
    assert content["hand_over"]["step"] == 10
    assert content["hand_over"]["update_rms"]["hidden"]["adamw"] > 0
    assert content["hand_over"]["update_rms"]["hidden"]["muon"] > 0
    assert content["hand_over"]["update_rms"].keys() >= {"embedding", "gain", "final_gain"}
    groups = content["hand_over"]["groups"]
    for role in ("embedding", "gain+final_gain"):  # stays as it is
        assert groups["adamw"].get(role) == groups["muon"].get(role)
    old, new = (groups[kind]["hidden+hidden_out"] for kind in ("adamw", "muon"))
    assert new["peak_lr"] == pytest.approx(old["peak_lr"] * 2**0.5)  # n/sqrt(2) after n/2
    assert new["lr_times_weight_decay"] == pytest.approx(old["lr_times_weight_decay"])
    lines = read_metrics(folder)
    assert [x["step"] for x in lines if x["kind"] == "train"] == [
        1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 16,
    ]  # every second, and where a phase starts or ends  # fmt: skip
    for line in (x for x in lines if x["kind"] == "train"):
        assert line["attention_logit"] > 0
        assert line["mfu"] > 0
        assert line["phase_seconds_left"] >= 0
    assert [x["step"] for x in lines if x["kind"] == "heldout"] == [2, 6, 9, 13, 16]
    names = [path.name for path in checkpoint.found(folder / "checkpoints")]
    assert names == [f"step-{n:08d}" for n in (10, 15, 16)]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_folder_is_named_by_recipe_and_bundle(
    files: Files, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = files(phases=[{"name": "one", "steps": 22, "seq_len": 16, "batch_size": 4}])
    folder = train(*paths, accept_unverified=True)
    assert folder == Path("runs") / f"tiny-{bundle.sha256[:8]}"
    assert (folder / "run.json").is_file()
    assert (folder / "data").is_dir()
    assert run_folder(bundle, entry.load_recipe(paths[1])) == folder


@pytest.mark.parametrize("number", [1, 9, 10, 16])
def test_a_signal_saves_and_the_same_command_goes_on(
    run: Callable[..., Path | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    run("whole")
    with monkeypatch.context() as patch:
        stop_at(patch, number, signal.SIGTERM if number % 2 else signal.SIGINT)
        stopped = run("stopped")
    assert (stopped is None) == (number < 16)  # a request in the last step is met by the end
    if stopped is None:
        assert "The same command goes on" in capsys.readouterr().out
        assert not (tmp_path / "stopped" / "run.json").exists()
        assert run("stopped") == tmp_path / "stopped"
    assert same_end(tmp_path / "whole", tmp_path / "stopped")
    assert record(tmp_path / "whole") == record(tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_crash_goes_on_from_the_last_checkpoint(
    run: Callable[..., Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("whole")
    folder = tmp_path / "crashed"
    original = Trainer.train_step
    for number in (3, 9, 13):  # checkpoints follow 5, 10 and 15
        with monkeypatch.context() as patch:

            def step(self: Trainer, *, measure: bool = False, at: int = number) -> Step:
                if self.step == at:
                    raise RuntimeError("crash")
                return original(self, measure=measure)

            patch.setattr(Trainer, "train_step", step)
            with pytest.raises(RuntimeError, match="crash"):
                run("crashed")
    newest = checkpoint.found(folder / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"broken")
    run("crashed")
    assert same_end(tmp_path / "whole", folder)
    assert record(tmp_path / "whole") == record(folder)


def test_a_finished_run_is_not_run_again(
    run: Callable[..., Path | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("whole")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("whole/**/*.json*")}
    capsys.readouterr()
    assert run("whole") == tmp_path / "whole"
    assert "finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("whole/**/*.json*")} == before


def test_another_recipe_in_the_same_folder_is_refused(
    run: Callable[..., Path | None], tmp_path: Path
) -> None:
    run("whole")
    with pytest.raises(UserError, match=r"another recipe; .*--out"):
        run("whole", seed=1)
    run("whole", log_every=5)  # how often something is logged is no other run


def test_steps_that_are_not_finite_end_the_run(
    run: Callable[..., Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._loss

    def broken(self: Trainer, tokens: torch.Tensor) -> torch.Tensor:
        bad = torch.is_grad_enabled() and self.step in (2, 6, 7, 8)
        return original(self, tokens) * (math.nan if bad else 1)

    monkeypatch.setattr(Trainer, "_loss", broken)
    with pytest.raises(UserError, match=r"3 steps, the last with loss nan.*max_skipped = 3"):
        run("broken", max_skipped=3)
    lines = [x for x in read_metrics(tmp_path / "broken") if x["kind"] == "skipped"]
    assert [line["step"] for line in lines] == [3, 7, 8, 9]
    assert lines[-1]["skipped"] == 4


def test_one_process_per_folder(run: Callable[..., Path | None], tmp_path: Path) -> None:
    with only_one(tmp_path / "busy"), pytest.raises(UserError, match="another process"):
        run("busy")
    with only_one(tmp_path / "busy"):  # the lock went with its holder
        pass


def test_a_second_signal_acts_as_ever() -> None:
    with graceful() as request:
        assert request.by is None
        os.kill(os.getpid(), signal.SIGINT)
        assert request.by == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_many_processes_are_refused(
    run: Callable[..., Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run("many")


def test_exit_codes(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle, recipe = files()
    words = ["train", "--bundle", str(bundle), "--recipe", str(recipe), "--out",
             str(tmp_path / "run")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    assert entry.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--accept-unverified" in error
    monkeypatch.setattr(sys, "argv", [*words, "--accept-unverified"])
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        assert entry.main() == 130
    assert entry.main() == 0
    monkeypatch.setattr(sys, "argv", ["train", "--recipe", "smoke"])
    assert entry.main() == 2


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(
    run: Callable[..., Path | None], files: Files, tmp_path: Path
) -> None:
    run("whole", checkpoint_every=2)
    bundle, recipe = files(checkpoint_every=2)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "full_scale.train", "--bundle", str(bundle), "--recipe",
               str(recipe), "--out", str(folder), "--data-folder", str(tmp_path / "data"),
               "--accept-unverified"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics, kills = folder / "metrics.jsonl", 0
    for delay in (0.0, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08):
        size = metrics.stat().st_size if metrics.exists() else 0
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as p:
            # wait until it trains, then kill it wherever it is by then
            while p.poll() is None and (not metrics.exists() or metrics.stat().st_size <= size):
                time.sleep(0.001)
            time.sleep(delay)
            kills += p.poll() is None
            p.kill()
    assert kills >= 3
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    assert same_end(tmp_path / "whole", folder)
    assert record(tmp_path / "whole") == record(folder)
