"""Creates the virtual environment and installs mutransfer into it; does nothing when current.

    python3 tools/setup.py [--venv .venv] [--extra dev ...] [--torch auto|pip|URL]

Needs Python >= 3.11 and plain pip, nothing else. Two things go beyond `pip install -e .`:

* torch: on Linux without an NVIDIA device the CPU build is taken, from PyTorch's CPU index or
  from wherever pip is configured to look; CUDA builds (gigabytes) are never fetched there unasked.
* torchvision: `mup` requires it and never imports it, and beside another build of torch it does
  not load. `mup` goes in without it, and one that cannot be imported is taken out again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
IMPORTS_TORCH_TO_BUILD = {"transformer-engine"}


class SetupError(Exception):
    """What went wrong and what to do about it, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Creates the environment; installs mutransfer.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml")
    parser.add_argument(
        "--torch",
        metavar="auto|pip|URL",
        help="auto: the CPU build where there is no NVIDIA device; pip: whatever pip finds; "
        "URL: from that package index. Default: as last time, at first auto",
    )
    options = parser.parse_args()
    try:
        Setup(options.venv.absolute(), options.extra, options.torch).run()
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    return 0


class Setup:
    """One environment: what it should be (`wanted`) and what the stamp in it says (`before`).

    Args:
        venv: The environment's folder, absolute.
        extras: Extras asked for; those asked for earlier stay.
        torch: `auto`, `pip`, an index URL, or `None` for what was chosen last time.
    """

    def __init__(self, venv: Path, extras: list[str], torch: str | None) -> None:
        self.venv, self.python = venv, str(venv / "bin" / "python")
        self.stamp = venv / "mutransfer-setup.json"
        try:
            self.before = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.before = {}
        self.project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
            "project"
        ]
        known = self.project["optional-dependencies"]
        if unknown := sorted(set(extras) - set(known)):
            raise SetupError(f"no extra {unknown[0]!r}; there are {', '.join(known)}")
        self.wanted = {
            "extras": sorted({*extras, *self.before.get("extras", [])} & set(known)),
            "files": digest(ROOT / "pyproject.toml", Path(__file__)),
            "python": platform.python_version(),
            "root": str(ROOT),
            "torch": torch or self.before.get("torch", "auto"),
        }

    def run(self) -> None:
        if self.before == self.wanted:
            return
        self.make_venv()
        self.stamp.unlink(missing_ok=True)
        say(f"installing into {self.venv} (Python {platform.python_version()}), once")
        wanted = list(self.project["dependencies"])
        for extra in self.wanted["extras"]:
            wanted += self.project["optional-dependencies"][extra]
        mup = [r for r in wanted if name_of(r) == "mup"]
        late = [r for r in wanted if name_of(r) in IMPORTS_TORCH_TO_BUILD]
        self.pip("install", "pip>=24.1")  # older ones fetch a whole wheel to read its metadata
        self.install_torch(next(r for r in wanted if name_of(r) == "torch"))
        self.pip("install", "--no-deps", *mup)
        say("the other libraries")
        rest = [r for r in wanted if r not in mup + late] + self.needs_of_mup()
        self.pip("install", "--no-warn-conflicts", *rest)  # it would warn about torchvision
        if late:
            self.pip("install", "--no-build-isolation", *late)
        self.pip("install", "--no-deps", "--editable", str(ROOT))
        self.drop_broken_torchvision()
        self.report()
        self.stamp.write_text(json.dumps(self.wanted), encoding="utf-8")

    def make_venv(self) -> None:
        """Makes the environment; one that is broken, moved or of another kind is made anew."""
        if self.venv.exists() and any(self.venv.iterdir()):
            if not (self.venv / "pyvenv.cfg").is_file():
                raise SetupError(f"{self.venv} is no virtual environment; move it out of the way")
            same_torch = self.before.get("torch", self.wanted["torch"]) == self.wanted["torch"]
            if same_torch and self.is_ours():
                return
        base = getattr(sys, "_base_executable", sys.executable)
        command = [base, "-m", "venv", "--clear", str(self.venv)]
        if subprocess.run(command, check=False).returncode != 0:
            raise SetupError("python -m venv failed (Debian, Ubuntu: apt install python3-venv)")

    def is_ours(self) -> bool:
        """Whether the environment works, stands where it was made, and has this very Python."""
        code = "import pip, platform, sys; print(platform.python_version(), sys.prefix, sep='|')"
        try:
            said = self.ask(code)
        except (SetupError, OSError):
            return False
        return said == f"{platform.python_version()}|{self.venv}"

    def install_torch(self, spec: str) -> None:
        """Installs torch where the build matters; else leaves it to pip, with all the rest."""
        choice = self.wanted["torch"]
        if self.before.get("torch") == choice and self.resolve(spec) == {}:
            return  # there already
        if choice == "pip" or (choice == "auto" and (sys.platform != "linux" or has_nvidia())):
            say("torch, the build that pip chooses")
            return
        sources = (
            [["--index-url", CPU_INDEX], []] if choice == "auto" else [["--index-url", choice]]
        )
        for source in sources:
            found = self.resolve(spec, "--ignore-installed", *source)
            if found and not (choice == "auto" and needs_cuda(found["metadata"])):
                version = found["metadata"]["version"]
                say(f"torch {version}")
                if found["download_info"]["url"].startswith("file:"):
                    source = []  # pip is configured to find it without that index
                self.pip("install", "--no-deps", *source, f"torch=={version}")
                return
        if choice != "auto":
            raise SetupError(f"no {spec} for Python {platform.python_version()} at {choice}")
        raise SetupError(
            f"no NVIDIA device here, and no CPU build of torch to be had: {CPU_INDEX} does not "
            "answer, and pip's own index has CUDA builds only (gigabytes). Let that address "
            "through, or set PIP_FIND_LINKS to a folder with a CPU wheel for this Python "
            f"({platform.python_version()}), or take the CUDA build with TORCH=pip."
        )

    def resolve(self, spec: str, *options: str) -> dict[str, Any] | None:
        """What pip would install for `spec`, as its report says it (metadata, download_info).

        Returns:
            `{}` where an installed one satisfies `spec`, `None` where pip finds nothing.
        """
        command = [self.python, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-",
                   "--no-deps", "--retries", "0", "--timeout", "20", *options, spec]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return None
        found = json.loads(done.stdout)["install"]
        return found[0] if found else {}

    def needs_of_mup(self) -> list[str]:
        """What the installed `mup` requires, without torch and torchvision."""
        said = self.ask("import importlib.metadata as m; print(*m.requires('mup'), sep='\\n')")
        unwanted = {"torch", "torchvision"}
        return [n for n in said.splitlines() if ";" not in n and name_of(n) not in unwanted]

    def drop_broken_torchvision(self) -> None:
        there = self.ask("from importlib.util import find_spec; print(find_spec('torchvision'))")
        command = [self.python, "-c", "import torchvision"]
        if (
            there != "None"
            and subprocess.run(command, capture_output=True, check=False).returncode != 0
        ):
            self.pip("uninstall", "--yes", "torchvision")
            say("took out torchvision: it does not load beside this torch, and nothing needs it")

    def report(self) -> None:
        version, cuda = self.ask(
            "import torch; print(torch.__version__, torch.cuda.is_available())"
        ).split()
        say(f"done: torch {version} on {'CUDA' if cuda == 'True' else 'the CPU'}")
        if has_nvidia() and cuda != "True":
            say("warning: there is an NVIDIA device, but this torch cannot use it; update the "
                f"driver, or choose a build, as in TORCH={CPU_INDEX[:-3]}cu126")  # fmt: skip

    def ask(self, code: str) -> str:
        """What the environment's Python prints when it runs `code`."""
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True,
                              check=False)  # fmt: skip
        if done.returncode != 0:
            raise SetupError(f"{self.python} -c {code!r} failed: {done.stderr.strip()}")
        return done.stdout.strip()

    def pip(self, verb: str, *arguments: str) -> None:
        # An editable install warns that folders may hide packages; mutransfer/house.py sees to it.
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        command = [self.python, "-m", "pip", verb, "--quiet", *arguments]
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            raise SetupError(f"'pip {verb} {' '.join(arguments)}' failed; pip says why above")


def name_of(requirement: str) -> str:
    """The normalized distribution name that a requirement begins with."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


def needs_cuda(metadata: dict[str, Any]) -> bool:
    """Whether a wheel's metadata asks for NVIDIA's libraries on this kind of machine."""
    needs = [n for n in metadata.get("requires_dist", []) if "extra ==" not in n]
    elsewhere = {n for n in needs if "platform_machine" in n and platform.machine() not in n}
    return any(name_of(n).startswith(("nvidia-", "cuda-")) and n not in elsewhere for n in needs)


def has_nvidia() -> bool:
    """Whether this machine has an NVIDIA device, as far as driver files and tools tell."""
    files = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/nvidia-smi")
    return any(Path(file).exists() for file in files) or shutil.which("nvidia-smi") is not None


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def say(line: str) -> None:
    print(f"set-up: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
