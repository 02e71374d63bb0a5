"""Plumbing that every script shares: command line, keyed randomness, files, digests, loops.

No equation stands in here, and nothing that a reader of the method needs."""

import ctypes
import functools
import hashlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import CodeType, FunctionType
from typing import Any, BinaryIO, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

T = TypeVar("T")
ROOT = Path(__file__).parent  # shipped models and data are found from any working directory
for library in ("HF_HUB", "TRANSFORMERS", "DIFFUSERS"):  # what concerns the user is said in one line, by us
    os.environ.setdefault(f"{library}_VERBOSITY", "error")


def located(path: str | Path) -> Path:
    """The path, or if there is nothing there, the same path inside the repository. Links are followed now: a
    run moves them, and what was found at the start is what is meant at the end."""
    return (ROOT / path if (ROOT / path).exists() and not Path(path).exists() else Path(path)).resolve()


# --- the command line: what goes wrong is one line ---


class InputError(ValueError):
    """Wrong input from the user: one line with what, got, expected and remedy, which `cli` prints."""


def cli(main: Callable[[Any], T], config: type, doc: str | None) -> T:
    """Parse the command line into `config` and run `main`. Returns what it returns.

    An error of the user's or of the system's is one line on stderr and exit status 1; --debug shows where it
    came from. Ctrl-C and SIGTERM stop a training loop at its next step, with everything saved
    (`training_steps`)."""
    debug = "--debug" in sys.argv
    args = [a for a in sys.argv[1:] if a != "--debug"]
    flags = [a.split("=")[0].replace("-", "_") for a in args if a.startswith("--")]
    if twice := {f for f in flags if flags.count(f) > 1}:
        print(f"error: {min(twice).replace('__', '--')} is given twice, expected once.", file=sys.stderr)
        raise SystemExit(1)
    said = io.StringIO()
    try:
        with redirect_stderr(said):  # tyro draws a box of ten lines
            options = (tyro.conf.FlagConversionOff,)
            cfg = tyro.cli(config, description=doc, use_underscores=True, config=options, args=args)
    except BrokenPipeError:  # of --help | head
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code:
            text = re.sub("For full helptext.*", "See --help.", re.sub("[─│╭╮╰╯]|-{5,}", "", said.getvalue()))
            print("error: " + " ".join(text.split()), file=sys.stderr)
        raise
    warnings.filterwarnings("ignore", module="huggingface_hub|PIL")  # its own old habits; a large photo
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore  # a name that the terminal cannot show
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell job starts with it ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        check_options(cfg)
        return main(cfg)
    except KeyboardInterrupt as stop:
        where = f": {stop}" if str(stop) else ""
        print(f"stopped{where}. The same command goes on from what is saved.", file=sys.stderr)
        raise SystemExit(130) from None
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        # RuntimeError is torch's word for "out of memory" and for shapes that do not fit
        if debug:
            raise
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        print("error: " + " ".join(f"{kind}{error}".split())[:600], file=sys.stderr)
        raise SystemExit(1) from None


def regular(path: str | Path) -> BinaryIO:
    """An open file; not a named pipe, which would be waited for."""
    if not Path(path).is_file():
        raise OSError("no such file")
    return open(path, "rb")


@contextmanager
def explained(message: str) -> Iterator[None]:
    """Turn whatever a foreign reader raises into an InputError: `message`, and its own in brackets."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{message} ({type(error).__name__}: {reason})") from error


def same_place(a: str | Path, b: str | Path) -> bool:
    """Links not followed: a run moves the link to its result."""
    return os.path.abspath(a) == os.path.abspath(b)


def check_options(cfg: Any) -> None:
    """What holds for every script: numbers are finite, lists are not empty, what is written is not read."""
    out = getattr(cfg, "out", "")
    for option in fields(cfg):
        value = getattr(cfg, option.name)
        values = value if isinstance(value, tuple) else (value,)
        word = option.name in ("out", "feedback", "rows") or get_origin(option.type) is Literal  # no path
        if option.default and (not values or "" in values):
            raise InputError(f"--{option.name}: is empty, expected one or more.")
        for v in values:
            limit = 2**63 if option.name.startswith("seed") else 10**9
            if isinstance(v, int | float) and not abs(v) < limit:
                raise InputError(f"--{option.name} {v}: expected a number below {limit}.")
            shipped = option.name == "data" and v in ("toys", "furniture")
            if out and isinstance(v, str) and not (word or shipped) and os.path.lexists(v):
                if same_place(v, out):
                    raise InputError(f"--out {out}: is --{option.name}, too. Expected another place.")
                if Path(v).is_dir() and Path(v).resolve() in Path(out).absolute().parents:
                    raise InputError(f"--out {out}: lies in --{option.name}. Expected another place.")


def check_output(option: str, path: str | Path, suffix: str = "", inputs: Sequence[str] = ()) -> Path:
    """What cannot be written, or is read, is said before the work, not after it. No suffix: a folder."""
    place, name = Path(path).resolve(), f"--{option} {path}"
    with explained(f"{name}: cannot be written, expected another place."):
        if suffix and (place.suffix.lower() != suffix or place.is_dir()):
            raise InputError(f"{name}: expected the name of a {suffix} file.")
        if read := [p for p in inputs if p and Path(p).resolve() in (place, *place.parents)]:
            raise InputError(f"{name}: lies in {read[0]}, which is read; expected another place.")
        folder = place.parent if suffix else place
        folder.mkdir(parents=True, exist_ok=True)
        NamedTemporaryFile(dir=folder, prefix=f".{place.name}").close()
    return place


def check_at_least(cfg: Any, low: float, *names: str) -> None:
    """The named options are finite and not below `low`; a tuple is not empty and none of its entries is."""
    for name in names:
        value = getattr(cfg, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(low <= v < float("inf") for v in values):
            raise InputError(f"--{name} {value}: expected {low:g} or more.")


# --- device, precision and randomness ---


def get_device(name: str = "auto") -> torch.device:
    """The CUDA GPU if there is one ("auto"), otherwise the CPU. On CUDA float32 is float32, not TF32."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise InputError(f"--device {name}: expected auto, cpu or cuda.")
    if name == "cpu" and sys.platform == "linux":
        # glibc gives large arrays back to the system at once and takes them anew, zeroed page by page: up to
        # a fifth of a forward. M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1) of 1 GiB keep them.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 1 << 30)
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise InputError(f"--device {name}: no CUDA GPU found, expected one. Use --device cpu.")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def use_bf16(mode: str, device: torch.device) -> bool:
    """ "on", "off", or "auto": autocast to bfloat16 where the hardware multiplies it faster than float32."""
    if mode == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")  # avx512_bf16, amx_bf16; elsewhere than on Linux: off
    return mode == "on" or (mode == "auto" and cpuinfo.is_file() and "bf16" in cpuinfo.read_text())


def hardware(cfg: Any) -> tuple[torch.device, bool]:
    """What --device and --bf16 come to."""
    device = get_device(cfg.device)
    return device, use_bf16(cfg.bf16, device)


def key_seed(*key: int) -> int:
    """Mix integers, e.g. (seed, object, candidate), into one 63-bit seed (splitmix64's finaliser after each).

    (seed, i) and (seed, step) number objects and steps. Otherwise the second part names the use. In a chain:
    0 x_T, 1 reference, 2 App. B, 3 step noises. Of the preference stage: 5 references, 6 batches, 8
    candidates, 9 negatives, 10 calls, 11 Diffusion-DPO."""
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
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix: Pillow's format
    with explained(f"{path}: cannot be written. Expected a place with room and permission."):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # no link is followed
            mode = temporary.stat().st_mode & 0o777
            write(temporary)
            temporary.chmod(mode)  # safetensors would leave 0600
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; dataclasses are converted by the caller."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2, default=str) + "\n"))


def load_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one raises InputError."""
    with explained(f"{path}: not readable as JSON, expected a file this project wrote."):
        with regular(path) as file:
            return json.load(file)


def fits(value: Any, hint: Any) -> bool:
    """Is a JSON value of the type that a dataclass names? NaN and infinity are of none; 1 is a float, too."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return value in args
    if get_origin(hint) is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(fits, value, args))
    if hint in (int, float):  # True is an int to Python, not to us
        return type(value) in (int, hint) and abs(value) < 1e9
    return type(value) is hint


def typed(kind: Callable[..., T], values: Any, where: str) -> T:
    """The dataclass `kind` from what a JSON file says: exactly its fields, each of its type."""
    hints = get_type_hints(kind)
    names = values.keys() if isinstance(values, dict) else set()
    if names != hints.keys():
        sets = (names - hints.keys(), hints.keys() - names)
        unknown, missing = (", ".join(sorted(x)) or "none" for x in sets)
        wrong = f"{where}: unknown {unknown}; missing {missing}"
        raise InputError(f"{wrong}; expected the fields of {kind.__name__}. Is it of another kind?")
    made = {}
    for name, hint in hints.items():
        value: Any = values[name]
        if is_dataclass(hint):
            value = typed(hint, value, f"{where}: {name}")  # type: ignore  # it is a class
        elif not fits(value, hint):
            raise InputError(f"{where}: {name} {value!r}, expected {get_args(hint) or hint.__name__}.")
        made[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write a flat dict of tensors as safetensors, with a digest that `load_tensors` checks."""
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    noted = {"digest": digest(whole)}
    write_atomic(path, lambda p: save_file(whole, str(p), metadata=noted))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU; a missing or broken one raises InputError."""
    with explained(f"{path}: not readable as safetensors, expected a whole file. Delete it."):
        regular(path).close()
        with safe_open(path, "pt") as file:
            tensors, noted = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
        if noted.get("digest") not in (None, digest(tensors)):
            raise ValueError("its numbers are not those that were written")
        return tensors


def pretrained(kind: Any, name: str, **where: Any) -> Any:
    """kind.from_pretrained with all weights: where some are missing, it only warns, and draws random ones."""
    model, report = kind.from_pretrained(name, output_loading_info=True, **where)
    broken = [n for n, p in model.named_parameters() if not p.isfinite().all()]
    if wrong := [*report["missing_keys"], *broken]:
        raise ValueError(f"{wrong[0]} is missing or not finite")
    return model


def load_weights(module: torch.nn.Module, path: str | Path, assign: bool = False) -> None:
    """Load safetensors weights strictly; names, shapes or numbers that cannot be right raise InputError.

    assign: the file's tensors become the parameters, for a module on the meta device."""
    tensors = load_tensors(path)
    if wrong := [k for k, v in tensors.items() if not (v.is_floating_point() and v.float().isfinite().all())]:
        raise InputError(f"{path}: {wrong[0]} is not finite, expected real numbers. Its run diverged.")
    with explained(f"{path}: expected the weights of {type(module).__name__} with the config beside it."):
        module.load_state_dict(tensors, assign=assign)


def published(url: str, file: str | Path = "") -> dict[str, Tensor]:
    """Weights from a file; without one from torch's hub cache, downloaded if absent."""
    how: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    state = torch.load(regular(file), **how) if file else torch.hub.load_state_dict_from_url(url, **how)
    state = state.get("state_dict", state)
    if not all(v.isfinite().all() for v in state.values()):
        raise ValueError("a weight is not finite")
    return state


def provenance(cfg: Any) -> dict[str, Any]:
    """Command, config, commit, hardware and versions: what makes a number a result."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        commit = "unknown"
    script = Path(sys.argv[0]).resolve()
    name = f"-m runs.{script.stem}" if script.parent.name == "runs" else script.name
    device = get_device(getattr(cfg, "device", "cpu"))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "command": f"python {name} {shlex.join(sys.argv[1:])}".strip(),
        "config": asdict(cfg),
        "commit": commit,
        "torch": torch.__version__,
        "hardware": gpu or f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "bf16": use_bf16(getattr(cfg, "bf16", "auto"), device),  # what "auto" came to
        "date": time.strftime("%Y-%m-%d"),
    }


# --- what something is, in 16 hexadecimal digits ---


def digest(what: Any) -> str:
    """16 digits of the SHA-256 of a tensor, a file (Path), a folder of weights (Path: config.json, weights;
    of a local SDXL base vae/ and unet/config.json, too), a function (code, defaults, closure, constants it
    names, not what it calls), or what JSON can say. A missing file raises InputError."""
    if isinstance(what, Tensor):
        plain = what.detach().cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bfloat16
        return hashlib.sha256(plain.numpy().data).hexdigest()[:16]
    if not isinstance(what, Path):
        said = json.dumps(what, sort_keys=True, default=parts)
        return hashlib.sha256(said.encode()).hexdigest()[:16]
    what = located(what)
    if what.is_dir():
        files = [what / name for name in ("config.json", "model.safetensors")]
        with suppress(InputError, KeyError, TypeError):  # it names none, or is refused on loading
            if base := load_json(files[0])["base"]:
                files += sorted((*Path(base).glob("vae/*.*"), *Path(base).glob("unet/config.json")))
        return digest([digest(file) for file in files])
    if not what.is_file():
        raise InputError(f"{what}: not found, expected a file, or a folder of weights.")
    with open(what, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def body(function: Any) -> CodeType:
    """The code of a function without what its docstring says."""
    code, said = function.__code__, function.__doc__
    return code.replace(co_consts=tuple(c for c in code.co_consts if c is None or c is not said))


def parts(what: Any) -> Any:
    """What JSON cannot say, in parts that it can."""
    if isinstance(what, functools.partial):
        return [what.func, what.args, what.keywords]
    if isinstance(what, FunctionType):
        held: list[Any] = [cell.cell_contents for cell in what.__closure__ or ()]
        named = [what.__globals__.get(name) for name in what.__code__.co_names]
        held += [v for v in named if isinstance(v, (int, float, str, tuple, Tensor))]
        return [body(what), what.__defaults__, what.__kwdefaults__, held]
    if isinstance(what, CodeType):
        return [what.co_code.hex(), what.co_names, what.co_consts]
    if isinstance(what, set | frozenset):  # their order differs from process to process
        return sorted(map(str, what))
    return digest(what) if isinstance(what, Tensor) else str(what)  # an object by its address: never stale


# --- what the three training loops share. The loop itself stays in its script ---

STATE = "state.pt"  # in a run's folder until it is finished


def checksum(path: Path, content: bytes) -> bytes:  # 32 of them
    """Of a state and of whose it is: a copy of another run's, which lies in another folder, is none."""
    return hashlib.sha256(path.parent.name.encode() + content).digest()


def save_state(path: Path, held: dict[str, Any], step: int, **rest: Any) -> None:
    """What a killed run goes on from: state dicts of its parts, steps done, and plain values."""
    buffer = io.BytesIO()
    torch.save({**held, "step": step, **rest}, buffer)
    content = buffer.getvalue()
    write_atomic(path, lambda p: p.write_bytes(checksum(path, content) + content))


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; {} if there is nothing, or if it is damaged, which is said."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    if checksum(path, content[32:]) != content[:32]:
        print(f"{path}: damaged, starting again")
        return {}
    return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)


SAVE_SECONDS = 120.0  # a killed run loses no more than this


def training_steps(start: int, total: int, label: str, save: Callable[[int], None]) -> Iterator[int]:
    """The numbers start .. total - 1, with a progress bar. `save(done)` is called every SAVE_SECONDS, after
    the last and, when Ctrl-C or SIGTERM asks to stop, after the step under way: what is saved is whole."""
    if start:
        print(f"{label}: goes on at step {start}")
    asked: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if asked:  # a second time: at once
            raise KeyboardInterrupt
        asked.append(number)

    before, saved = signal.signal(signal.SIGINT, handler), time.time()
    try:
        for step in tqdm(range(start, total), initial=start, total=total, desc=label, disable=None):
            yield step
            if asked or step + 1 == total or time.time() - saved >= SAVE_SECONDS:
                save(step + 1)
                saved = time.time()
            if asked:
                raise KeyboardInterrupt(f"{label} at step {step + 1}")
    finally:
        signal.signal(signal.SIGINT, before)


class Log:
    """log.jsonl: every `every` steps, and after the last, the steps done and means since the line before."""

    def __init__(self, path: Path, every: int, last: int, state: dict[str, Any] | None = None) -> None:
        """`state`: of a killed run. Its file may tell of steps that are now done again."""
        self.path, self.every, self.last = path, every, last
        self.state = state or {"text": "", "sums": {}}  # all lines, and the numbers of the unfinished one
        write_atomic(path, lambda p: p.write_text(self.state["text"]))

    def add(self, step: int, **values: float) -> None:
        """Add one step's numbers; `step` counts from 0."""
        sums = self.state["sums"]
        for name, value in values.items():
            sums.setdefault(name, []).append(value)
        if (step + 1) % self.every == 0 or step + 1 == self.last:
            self.line(step + 1, **{k: sum(v) / len(v) for k, v in sums.items()})
            sums.clear()

    def line(self, step: int, **values: Any) -> None:
        """Write one line now."""
        self.state["text"] += json.dumps({"step": step, **values}) + "\n"
        write_atomic(self.path, lambda p: p.write_text(self.state["text"]))


def optimizer_step(
    optimizers: Sequence[Optimizer], parameters: Sequence[Tensor], rate: float, step: int, clip: float = 1.0
) -> float:
    """Clip, step each optimizer at `rate` times its own rate, clear. Returns the gradient's norm."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not torch.isfinite(norm):
        raise InputError(f"step {step}: the gradient is {norm.item()}, expected a finite one. Lower --lr.")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.setdefault("peak_lr", group["lr"])
        optimizer.step()
        optimizer.zero_grad()
    return norm.item()
