"""Plumbing that every script shares: device, keyed randomness, files that are written whole, the command line.

Nothing in here knows of diffusion, views or preferences: an equation that needs this file is in the wrong file.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class InputError(ValueError):
    """Wrong input from the user: one line with what, got, expected and remedy. `cli` prints it and exits with 1."""


def cli(main: Callable[[Any], Any], config: type, doc: str | None) -> None:
    """Parse the command line into `config`, run `main`; an InputError becomes one line on stderr and exit status 1."""
    cfg = tyro.cli(config, description=doc, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    try:
        main(cfg)
    except InputError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None


# --- device, precision and randomness ---


def get_device(name: str = "auto") -> torch.device:
    """ "auto" takes the CUDA GPU if there is one, otherwise the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise InputError(f"--device {name}: expected auto, cpu or cuda.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no CUDA GPU found, expected one. Use --device cpu.")
    return torch.device(name)


def use_bf16(mode: str, device: torch.device) -> bool:
    """ "on", "off", or "auto": autocast to bfloat16 where the hardware multiplies it faster than float32."""
    if mode not in ("auto", "on", "off"):
        raise InputError(f"--bf16 {mode}: expected auto, on or off.")
    if mode == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")  # avx512_bf16, amx_bf16; elsewhere than on Linux: off
    return mode == "on" or (mode == "auto" and cpuinfo.is_file() and "bf16" in cpuinfo.read_text())


def key_seed(*key: int) -> int:
    """Mix integers, e.g. (seed, object, candidate), into one 63-bit seed (splitmix64's finaliser after each)."""
    state = 0x9E3779B97F4A7C15
    for part in key:
        state = (state ^ (int(part) + 0x9E3779B97F4A7C15)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, never on batch size, device or what was drawn before."""
    return torch.Generator().manual_seed(key_seed(*key))


# --- files: written beside and renamed, so that a killed run never leaves half a file ---


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path in the same folder, then rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix: Pillow chooses a format by it
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; dataclasses are converted by the caller."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2, default=str) + "\n"))


def load_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one raises InputError."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); expected a file this project wrote.") from None


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a flat dict of tensors as safetensors."""
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, lambda p: save_file(whole, str(p), metadata=metadata))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU; a missing or broken one raises InputError."""
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: not readable as safetensors ({error}); expected a whole file. Delete it and make it again."
        ) from None


def open_tensors(path: str | Path) -> Any:
    """Open a safetensors file as a memory map, for reading parts of it; a missing or broken one raises InputError."""
    try:
        return safe_open(str(path), "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error}). Delete it and start again.") from None


def load_state(path: str | Path) -> dict[str, Any]:
    """Read to the CPU the training state that a killed run goes on from; a broken one raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: not readable ({str(error).splitlines()[0]}); expected a training state. Delete it to start again."
        ) from None


def digest(what: str | Path | Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file or a tensor; a missing file raises InputError."""
    if isinstance(what, Tensor):
        return hashlib.sha256(what.contiguous().numpy().tobytes()).hexdigest()[:16]
    if not Path(what).is_file():
        raise InputError(f"{what}: not found, expected a file of weights. Check the folder's name.")
    with open(what, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_weights(module: torch.nn.Module, path: str | Path, assign: bool = False) -> None:
    """Load safetensors weights strictly; names or shapes that do not fit raise InputError with the first of them.

    assign: the file's tensors become the parameters, for a module on the meta device.
    """
    tensors, own = load_tensors(path), module.state_dict()
    wrong = [k for k in sorted(own.keys() | tensors.keys()) if k not in own or k not in tensors]
    wrong += [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} tensors are missing, unexpected or of another shape (first: {wrong[0]}); "
            f"expected the weights of {type(module).__name__} with the config beside the file."
        )
    module.load_state_dict(tensors, assign=assign)


def claim(folder: str | Path, made_by: dict[str, Any]) -> None:
    """Note what a folder is made by, so that results of one setting are never taken for another's.

    If it is already claimed by other settings, raise InputError naming them.
    """
    note = Path(folder) / "made_by.json"
    made_by = json.loads(json.dumps(made_by))  # tuples become lists, as in the file
    before = load_json(note) if note.is_file() else made_by
    changed = [k for k in made_by.keys() | before.keys() if made_by.get(k) != before.get(k)]
    if changed:
        got = ", ".join(f"{k} {before.get(k)}" for k in sorted(changed))
        want = ", ".join(f"{k} {made_by.get(k)}" for k in sorted(changed))
        raise InputError(f"{folder}: made with {got}; expected {want}. Delete the folder, or take another.")
    if not note.is_file():
        save_json(note, made_by)


def log_line(path: str | Path, **values: Any) -> None:
    """Append one JSON object to a .jsonl log."""
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


def trim_log(path: str | Path, step: int) -> None:
    """Drop the lines after `step`: a killed run may have logged steps that are now done again."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_atomic(path, lambda p: p.write_text("".join(kept)))


def provenance(cfg: Any) -> dict[str, Any]:
    """Command, config, commit, hardware and versions: what makes a number a result."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(
            git, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        commit = "unknown"
    script = Path(sys.argv[0]).resolve()
    on_gpu = torch.cuda.is_available() and getattr(cfg, "device", "cpu") != "cpu"
    return {
        "command": " ".join(
            ["python", f"-m runs.{script.stem}" if script.parent.name == "runs" else script.name, *sys.argv[1:]]
        ),
        "config": asdict(cfg),
        "commit": commit,
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
