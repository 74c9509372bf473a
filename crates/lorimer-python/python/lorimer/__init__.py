"""Fine-tune, evaluate, combine and run low-rank adapters on the machine you have.

    import lorimer

    base = lorimer.Base("smollm2-135m")
    run = base.train("rows.jsonl", output="runs/mine", rank=8, epochs=2)
    print(base.evaluate("test.jsonl", adapter=run.adapter)["loss"])
    print(base.generate("Say it shorter: …", adapter=run.adapter))

What computes is the engine of the command line: the same settings give the same bytes. What cannot be done raises `lorimer.Error` with the sentence that the
command line prints. Settings are the command line's flags with underscores; `lorimer.help("train")` lists them.
"""

from __future__ import annotations

import json as _json
import os as _os
import tempfile as _tempfile
from dataclasses import dataclass as _dataclass, field as _field
from typing import Any, Callable, Iterable, Mapping, Sequence, Union

# The tensor library asks /proc/cpuinfo at each of its products unless it is told; read once, when the first product runs.
_os.environ.setdefault("RAYON_NUM_THREADS", str(len(_os.sched_getaffinity(0)) if hasattr(_os, "sched_getaffinity") else _os.cpu_count() or 1))

from . import _lorimer
from ._lorimer import Adapter, Error, Interrupted, __version__
from ._progress import listener as _listener

__all__ = [
    "Adapter", "Base", "Engine", "Error", "Generation", "Interrupted", "Run", "__version__", "check", "combine", "command", "convert", "extract", "help",
    "inspect", "merge", "methods", "prune", "quantize", "recover", "resize",
]

Path = Union[str, "_os.PathLike[str]"]
#: A folder, an adapter in memory, several of these, or a mapping from one to its weight.
Adapters = Union[None, Path, Adapter, Sequence[Any], Mapping[Any, float]]
#: A text, messages (`[{"role": …, "content": …}]`), or token ids.
Prompt = Union[str, Sequence[Mapping[str, Any]], Sequence[int]]
#: True for a bar, False for silence, or what is called with a dict for each event.
Progress = Union[bool, Callable[[dict], Any]]

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "min_tokens")


def _plain(value: Any) -> Any:
    """A setting as JSON: paths as text, NumPy's numbers as Python's."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, _os.PathLike):
        return _os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    raise TypeError(f"a setting should be a text, a number, a path, a list or a dict, not {type(value).__name__}")


def _flags(settings: Mapping[str, Any]) -> list[str]:
    return _lorimer.flags(_json.dumps(_plain(settings)))


def command(name: str, *positional: Path, progress: Progress = False, **settings: Any) -> Any:
    """Runs a subcommand of the command line and gives what `--json` prints, as Python objects.

    `command("resize", adapter="runs/mine", rank=4, output="runs/small")`: keyword arguments are its flags with underscores.
    """
    with _listener(progress, name) as listener:
        return _lorimer.run([*name.split(), *_flags(settings), *map(_os.fspath, positional)], listener)


def help(name: str) -> str:
    """The flags of a subcommand, as the command line's `--help` has them."""
    return _lorimer.run([*name.split(), "--help"])


def methods() -> Any:
    """The methods that can be trained, with their settings."""
    return command("methods")


def merge(model: Path, adapters: Adapters, output: Path, *, progress: Progress = False, **settings: Any) -> dict:
    """Merges adapters into a base's weights: a folder that transformers loads, or a `.gguf` file."""
    with _folders(adapters) as named:
        return command("merge", progress=progress, model=model, adapter=named, output=output, **settings)


def combine(adapters: Adapters, output: Path, *, method: str = "linear", progress: Progress = False, **settings: Any) -> dict:
    """Combines adapters into one, without a base: `linear`, `ties`, `dare_ties`, `lego`, … (`lorimer.help("merge")` lists them)."""
    with _folders(adapters) as named:
        return command("merge", *named, progress=progress, method=method, output=output, **settings)


def convert(adapter: Union[Path, Adapter], output: Path, *, to: str, progress: Progress = False, **settings: Any) -> dict:
    """Converts an adapter between the files of PEFT, llama.cpp, mlx-lm, kohya and diffusers."""
    with _folders(adapter) as named:
        return command("convert", *named, progress=progress, to=to, output=output, **settings)


def inspect(adapter: Union[Path, Adapter]) -> dict:
    """What is in an adapter: method, rank, the norm and effective rank of each module's change."""
    return _adapter(adapter).inspect()


def check(adapter: Union[Path, Adapter], model: Path = "smollm2-135m", **settings: Any) -> dict:
    """Checks that an adapter fits its base, does something, and answers as it did when it was trained."""
    with _folders(adapter) as named:
        return command("check", *named, model=model, **settings)


def extract(tuned: Path, output: Path, *, model: Path = "smollm2-135m", progress: Progress = False, **settings: Any) -> dict:
    """The nearest LoRA of what full tuning has made of a base."""
    return command("extract", tuned, progress=progress, model=model, output=output, **settings)


def resize(adapter: Union[Path, Adapter], output: Path, *, rank: int, **settings: Any) -> dict:
    """Cuts a LoRA to its first ranks."""
    with _folders(adapter) as named:
        return command("resize", *named, rank=rank, output=output, **settings)


def prune(output: Path, *, ratio: float, method: str = "stru", model: Path = "smollm2-135m", progress: Progress = False, **settings: Any) -> dict:
    """Takes heads and channels out of a base: a smaller model in a folder, with its `pruning.json`."""
    return command("prune", progress=progress, model=model, method=method, ratio=ratio, output=output, **settings)


def recover(adapter: Union[Path, Adapter], output: Path, *, pruning: Path, **settings: Any) -> dict:
    """Makes an adapter of a pruned model one of the whole base, by the pruned model's `pruning.json`."""
    with _folders(adapter) as named:
        return command("recover", adapter=named, pruning=pruning, output=output, **settings)


def quantize(output: Path, *, progress: Progress = False, **settings: Any) -> dict:
    """Puts a base into 2 to 8 bits a weight, with an adapter that begins as its repair."""
    return command("quantize", progress=progress, output=output, **settings)


def _adapter(adapter: Union[Path, Adapter]) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else Adapter.load(_os.fspath(adapter))


def _weighted(adapters: Adapters) -> list[tuple[Any, float]]:
    if adapters is None:
        return []
    if isinstance(adapters, (str, _os.PathLike, Adapter)):
        return [(adapters, 1.0)]
    if isinstance(adapters, Mapping):
        return [(adapter, float(weight)) for adapter, weight in adapters.items()]
    return [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]


class _folders:
    """Adapters as the command line names them; those in memory are written to a folder that is gone at the end."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = _weighted(adapters)
        self._folder: Any = None

    def __enter__(self) -> list[str]:
        named = []
        for i, (adapter, weight) in enumerate(self._adapters):
            if isinstance(adapter, Adapter):
                if adapter.path is not None:
                    adapter = adapter.path
                else:
                    self._folder = self._folder or _tempfile.TemporaryDirectory(prefix="lorimer-")
                    folder = _os.path.join(self._folder.name, f"adapter-{i}")
                    adapter.save(folder)
                    adapter = folder
            path = _os.fspath(adapter)
            named.append(path if weight == 1.0 else f"{path}={weight!r}")
        return named

    def __exit__(self, *_: Any) -> None:
        if self._folder is not None:
            self._folder.cleanup()


@_dataclass(frozen=True)
class Run:
    """What a training run gave. `result` is what `lorimer train --json` prints."""

    path: str
    result: dict = _field(repr=False)

    @property
    def adapter(self) -> Adapter:
        """The adapter, read from the run's folder."""
        return Adapter.load(self.path)

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return self.result["losses"]

    @property
    def evaluation(self) -> Union[dict, None]:
        """What was measured on `eval_data`."""
        return self.result["evaluation"]


class Generation(str):
    """An answer: its text, with `tokens`, `finish_reason` and `prompt_tokens`."""

    tokens: int
    finish_reason: str
    prompt_tokens: int

    def __new__(cls, answer: Mapping[str, Any]) -> "Generation":
        self = super().__new__(cls, answer["text"])
        self.tokens, self.finish_reason, self.prompt_tokens = answer["tokens"], answer["finish_reason"], answer["prompt_tokens"]
        return self


def _sampling(settings: dict) -> str:
    given = {key: settings.pop(key) for key in _SAMPLING if key in settings}
    if settings:
        raise TypeError(f"no setting {next(iter(settings))!r}; there are {', '.join(_SAMPLING)}")
    return _json.dumps(_plain(given))


class Base(_lorimer.Base):
    __doc__ = _lorimer.Base.__doc__

    def train(self, data: Union[Path, Iterable[Mapping[str, Any]]], *, output: Path = "runs/train", eval_data: Union[None, Path, Iterable[Mapping[str, Any]]] = None,
              method: str = "lora", progress: Progress = True, **settings: Any) -> Run:
        """Fine-tunes an adapter and writes it to `output`, a folder that PEFT loads.

        `data`: a `.jsonl`, `.json`, `.csv` or `.parquet` file, or rows as dicts. Settings are the flags of `lorimer train` with underscores
        (`rank`, `alpha`, `lr`, `epochs`, `max_steps`, `batch_size`, `target_modules`, `seed`, `set={"key": value}`, …). On Ctrl-C a checkpoint is written, and
        `resume=True` goes on from it to the same bytes.
        """
        with _Rows() as rows, _listener(progress, "train") as listener:
            given = dict(settings, data=rows.path(data), output=output, method=method)
            if eval_data is not None:
                given["eval_data"] = rows.path(eval_data)
            result = self._run("train", _flags(given), listener)
        return Run(_os.fspath(output), result)

    def evaluate(self, data: Union[Path, Iterable[Mapping[str, Any]]], adapter: Adapters = None, *, choices: Sequence[str] = (), format: Union[None, str] = None,
                 max_length: int = 1024, limit: Union[None, int] = None, skip_bad_rows: bool = False, progress: Progress = False) -> dict:
        """Loss, perplexity, exact matches and choice accuracy on rows, of the base or of adapters on it."""
        options = {"choices": list(choices), "format": format, "max_length": max_length, "limit": limit, "skip_bad_rows": skip_bad_rows}
        with _Rows() as rows, _listener(progress, "evaluate") as listener:
            return self._evaluate(rows.path(data), self._adapters(adapter), _json.dumps(options), listener)

    def generate(self, prompt: Prompt, adapter: Adapters = None, *, max_tokens: int = 256, seed: int = 0, stop: Union[str, Sequence[str]] = (), raw: bool = False,
                 stream: Union[None, Callable[[str], Any]] = None, **sampling: Any) -> Generation:
        """Answers a prompt. A text is taken as the user's message, or with `raw` as it is; `stream` hears pieces as they come. Sampling: `temperature`,
        `top_k`, `top_p`, `min_p`, `repetition_penalty`, `frequency_penalty`, `presence_penalty`, `min_tokens`."""
        stops = [stop] if isinstance(stop, str) else list(stop)
        return Generation(self._generate(self.tokens(prompt, raw=raw), self._adapters(adapter), max_tokens, _sampling(sampling), seed, stops, stream))

    def tokens(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt as `generate` takes it."""
        if isinstance(prompt, str):
            return self.encode(prompt) if raw else self.chat([{"role": "user", "content": prompt}])
        items = list(prompt)
        if items and isinstance(items[0], Mapping):
            return self.chat(items)
        return [int(token) for token in items]

    def engine(self, adapters: Union[None, Mapping[str, Union[Path, Adapter]]] = None, *, memory: str = "1GiB") -> "Engine":
        """An engine of this base with adapters by name."""
        return Engine(self, adapters, memory=memory)

    def check(self, adapter: Union[Path, Adapter], **settings: Any) -> dict:
        """Checks that an adapter fits this base, does something, and answers as it did when it was trained."""
        with _folders(adapter) as named:
            return self._run("check", [*_flags(settings), *named])

    @staticmethod
    def _adapters(adapters: Adapters) -> list[tuple[Adapter, float]]:
        return [(_adapter(adapter), weight) for adapter, weight in _weighted(adapters)]


class Engine(_lorimer.Engine):
    __doc__ = _lorimer.Engine.__doc__

    def __new__(cls, base: Base, adapters: Union[None, Mapping[str, Union[Path, Adapter]]] = None, *, memory: str = "1GiB") -> "Engine":
        self = super().__new__(cls, base, memory=memory)
        self._base = base
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter)
        return self

    def add(self, name: str, adapter: Union[Path, Adapter]) -> None:
        """Puts an adapter into the engine, in the place of one of the same name."""
        super().add(name, _adapter(adapter))

    def generate(self, prompts: Sequence[Union[str, Mapping[str, Any]]], *, progress: Progress = False, **defaults: Any) -> list[Generation]:
        """Answers prompts together, in their order. Each is a text, or a dict with `prompt` and any of `adapter` (a name, names, or names with weights),
        `max_tokens`, `seed`, `stop`, `raw` and the sampling settings of `Base.generate`; keyword arguments are for those that do not say."""
        requests = []
        for prompt in prompts:
            given = {**defaults, **(prompt if isinstance(prompt, Mapping) else {"prompt": prompt})}
            tokens = self._base.tokens(given.pop("prompt"), raw=given.pop("raw", False))
            adapter = _weighted(given.pop("adapter", None))
            stop = given.pop("stop", ())
            stops = [stop] if isinstance(stop, str) else list(stop)
            requests.append((tokens, adapter, given.pop("max_tokens", 256), None, given.pop("seed", 0), stops))
            requests[-1] = (*requests[-1][:3], _sampling(given), *requests[-1][4:])
        with _listener(progress, "generate") as listener:
            return [Generation(answer) for answer in self._generate(requests, listener)]


class _Rows:
    """Rows as a file: paths as they are, dicts in a file that is gone at the end."""

    def __init__(self) -> None:
        self._folder: Any = None
        self._count = 0

    def __enter__(self) -> "_Rows":
        return self

    def path(self, data: Any) -> str:
        if isinstance(data, (str, _os.PathLike)):
            return _os.fspath(data)
        self._folder = self._folder or _tempfile.TemporaryDirectory(prefix="lorimer-")
        self._count += 1
        path = _os.path.join(self._folder.name, "rows.jsonl" if self._count == 1 else f"rows-{self._count}.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for row in data:
                file.write(_json.dumps(row, ensure_ascii=False) + "\n")
        return path

    def __exit__(self, *_: Any) -> None:
        if self._folder is not None:
            self._folder.cleanup()
