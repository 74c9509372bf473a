"""FLoRA over Flower: a `Strategy` for the server and a `ClientApp` for clients. Needs `flwr` (`pip install 'lorimer[flower]'`).

Clients train a fresh LoRA of their own rank on top of the global one and send its factors; the server stacks them, each by its share of the rows, which is
exact. What `lorimer federate simulate` does in one process is done here by Flower's simulation, or by its SuperLink and SuperNodes, to the same bytes.

    # server.py                                             # client.py
    from flwr.serverapp import ServerApp                    from lorimer.flower import client_app
    from lorimer.flower import Flora                        app = client_app("smollm2-135m", data=lambda context: context.node_config["data"])
    app = ServerApp()

    @app.main()
    def main(grid, context):
        strategy = Flora(ranks=[16, 8, 4], output="runs/federation")
        strategy.start(grid, strategy.initial(), num_rounds=3)
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from typing import Any, Callable, Iterable, Mapping, Sequence, Union

import numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from . import Adapter, Base, Error, combine, command

__all__ = ["Flora", "client_app", "epsilon"]

_log = logging.getLogger("lorimer")

#: An adapter on its way: the bytes of a safetensors file and PEFT's configuration, as arrays of bytes. Their names are fixed, whatever the ranks.
_FACTORS, _CONFIG = "adapter.safetensors", "adapter_config.json"


def _packed(adapter: Union[None, Adapter]) -> ArrayRecord:
    if adapter is None:
        return ArrayRecord({})
    parts = {_FACTORS: adapter.safetensors(), _CONFIG: json.dumps(adapter.config, sort_keys=True).encode()}
    return ArrayRecord({name: Array(numpy.frombuffer(data, numpy.uint8)) for name, data in parts.items()})


def _bytes(record: ArrayRecord, name: str, most: int) -> bytes:
    """The bytes of an array that was sent, read by hand: what the sender says of it is not believed."""
    if name not in record:
        raise Error(f"the upload has no `{name}`")
    data = record[name].data
    if len(data) > most:
        raise Error(f"`{name}` takes {len(data)} bytes, at most {most} are read")
    if data[:6] != b"\x93NUMPY" or len(data) < 10 or data[6] != 1:
        raise Error(f"`{name}` is no array in NumPy's format")
    start = 10 + int.from_bytes(data[8:10], "little")
    header = data[10:start].decode("latin-1")
    body = data[start:]
    if "'|u1'" not in header or f"({len(body)},)" not in header:
        raise Error(f"`{name}` should be {len(body)} bytes; its header says otherwise")
    return body


def unpacked(record: ArrayRecord, *, rank: Union[None, int] = None, like: Union[None, Adapter] = None, most: int = 1 << 30) -> Adapter:
    """The adapter that was sent, if it is one: bounded, finite, of the rank and the modules that were asked for."""
    factors = _bytes(record, _FACTORS, most)
    try:
        config = json.loads(_bytes(record, _CONFIG, 1 << 20))
    except ValueError:
        raise Error("the upload's configuration is no JSON") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise Error("the upload is no LoRA")
    adapter = Adapter.from_safetensors(factors, config)
    if rank is not None and config.get("r") != rank:
        raise Error(f"the upload has rank {config.get('r')}, rank {rank} was asked for")
    adapter.inspect()
    if like is not None:
        sides = {name: _side(name, array) for name, array in adapter.tensors().items()}
        wanted = {name: _side(name, array) for name, array in like.tensors().items()}
        if sides != wanted:
            name = next(iter(sorted(set(sides.items()) ^ set(wanted.items()))))[0]
            raise Error(f"`{name}` of the upload has not the shape that the base wants")
    return adapter


def _side(name: str, array: Any) -> int:
    """The side of a factor that is the base's: A's inputs, B's outputs."""
    return array.shape[0 if ".lora_B." in name else -1]


class Flora(Strategy):
    """FLoRA's server. `ranks` are given to clients by their `partition-id`, in turn; settings are those of `Base.train`, for each client's round.

    A client that is gone, late, raises or sends what is no adapter of the rank and modules that were asked for is named and left out of the round, whose
    shares are of those that answered. `output` gets `round_N/update`, `round_N/global`, `global` and `ledger.jsonl`.
    """

    def __init__(self, *, ranks: Sequence[int] = (16,), output: Union[str, "os.PathLike[str]"] = "runs/federation", clients: Union[None, int] = None,
                 least: int = 1, patience: float = 3600.0, most_bytes: int = 1 << 30, clip: float = 0.0, noise: float = 0.0, **settings: Any) -> None:
        self.ranks, self.output, self.clients, self.least = list(ranks), os.fspath(output), clients, least
        self.patience, self.most_bytes, self.settings = patience, most_bytes, settings
        self.clip, self.noise = clip, noise
        self.refused: list[tuple[int, str, str]] = []
        self._sent: dict[str, int] = {}
        self._named: dict[int, int] = {}
        self._global: Union[None, Adapter] = None

    def initial(self) -> ArrayRecord:
        """What `start` begins with: no adapter."""
        return _packed(None)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        import time

        limit = time.monotonic() + self.patience
        while True:
            nodes = sorted(grid.get_node_ids())
            if len(nodes) >= (self.clients or self.least) or time.monotonic() > limit or server_round > 1 and len(nodes) >= self.least:
                break
            time.sleep(0.5)
        messages = []
        for node in nodes:
            asked = ConfigRecord({"round": server_round, "ranks": list(self.ranks), "settings": json.dumps(self.settings, sort_keys=True), "clip": self.clip, "noise": self.noise})
            messages.append(Message(RecordDict({"global": _packed(self._global), "asked": asked}), dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(server_round)))
        self._messages = messages
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[Union[None, ArrayRecord], Union[None, MetricRecord]]:
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in self._messages}
        silent = set(nodes.values())
        brought: dict[int, tuple[Adapter, int, float]] = {}
        for reply in replies:
            node = nodes.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            silent.discard(node)
            if reply.has_error():
                self._refuse(server_round, node, f"failed: {reply.error.reason or reply.error.code}")
                continue
            try:
                told = reply.content["told"]
                partition, rows = int(told["partition"]), int(told["rows"])
                if not 0 < rows < 1 << 40 or partition < 0:
                    raise Error(f"{rows} rows of client {partition} are no number of rows")
                if partition in brought or self._named.setdefault(partition, node) != node:
                    raise Error(f"client {partition} is another node already")
                like = brought[min(brought)][0] if brought else self._global
                adapter = unpacked(reply.content["adapter"], rank=self.ranks[partition % len(self.ranks)], like=like, most=self.most_bytes)
                brought[partition] = (adapter, rows, float(told["loss"]))
            except (Error, KeyError, ValueError, TypeError) as problem:
                self._refuse(server_round, node, f"sent what is no adapter for this round: {problem}")
        for node in sorted(silent):
            self._refuse(server_round, node, "did not answer in time")
        if len(brought) < self.least:
            _log.error("round %d: %d clients answered, at least %d are needed; the global adapter stays as it was", server_round, len(brought), self.least)
            return None, None
        # In the order of clients, not of their answers: sums of floats depend on it.
        order = sorted(brought)
        total = sum(brought[k][1] for k in order)
        folder = os.path.join(self.output, f"round_{server_round}")
        shutil.rmtree(folder, ignore_errors=True)
        update = os.path.join(folder, "update")
        named = []
        for k in order:
            path = os.path.join(folder, f"client_{k}")
            brought[k][0].save(path)
            named.append((path, brought[k][1] / total))
        combine(named, update, method="cat")
        before = os.path.join(self.output, f"round_{server_round}", "before")
        whole = os.path.join(folder, "global")
        if self._global is None:
            combine([update], whole, method="cat")
        else:
            self._global.save(before)
            combine([before, update], whole, method="cat")
            shutil.rmtree(before)
        self._global = Adapter.load(whole)
        shutil.rmtree(os.path.join(self.output, "global"), ignore_errors=True)
        self._global.save(os.path.join(self.output, "global"))
        entry = {
            "round": server_round,
            "clients": [{"client": f"client_{k}", "rows": brought[k][1], "weight": brought[k][1] / total, "content_id": brought[k][0].id, "loss": brought[k][2],
                         "up_bytes": _numbers(brought[k][0])} for k in order],
            "down_bytes": _numbers(Adapter.load(update)),
            "refused": [{"node": node, "why": why} for r, node, why in self._refused(server_round)],
        }
        with open(os.path.join(self.output, "ledger.jsonl"), "a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(entry) + "\n")
        return _packed(self._global), MetricRecord({"clients": len(order), "loss": sum(brought[k][2] * brought[k][1] for k in order) / total})

    def _refuse(self, server_round: int, node: int, why: str) -> None:
        _log.warning("round %d: node %d %s", server_round, node, why)
        self.refused.append((server_round, node, why))

    def _refused(self, server_round: int) -> list[tuple[int, int, str]]:
        return [entry for entry in self.refused if entry[0] == server_round]

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Union[None, MetricRecord]:
        return None

    def summary(self) -> None:
        _log.info("FLoRA: ranks %s, settings %s", self.ranks, self.settings)


def _numbers(adapter: Adapter) -> int:
    """Bytes of an adapter's numbers, four each."""
    return 4 * sum(int(array.size) for array in adapter.tensors().values())


def client_app(model: Union[str, "os.PathLike[str]", Callable[[Context], str]], data: Callable[[Context], Any], **opened: Any) -> ClientApp:
    """A client that trains on its own rows: `data(context)` gives a file or rows. Further arguments open the base (`dtype`, `tokenizer`)."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return train_round(message, context, model(context) if callable(model) else model, data(context), opened)

    return app


def train_round(message: Message, context: Context, model: Union[str, "os.PathLike[str]"], data: Any, opened: Mapping[str, Any] = {}) -> Message:
    """What a client does in a round: trains on top of the global adapter and gives its own."""
    asked = message.content["asked"]
    partition = int(context.node_config["partition-id"])
    ranks = [int(rank) for rank in asked["ranks"]]
    rank = ranks[partition % len(ranks)]
    base = Base(model, **opened)
    with tempfile.TemporaryDirectory(prefix="lorimer-") as work:
        beneath = {}
        record = message.content["global"]
        if len(record):
            unpacked(record).save(os.path.join(work, "global"))
            beneath = {"beneath": os.path.join(work, "global")}
        settings = {"lr": 3e-4, "dropout": 0.05, "target_modules": "q_proj,v_proj", "batch_size": 16, **json.loads(str(asked["settings"]))}
        seed = round_seed(int(settings.pop("seed", 0)), int(asked["round"]), f"client_{partition}")
        own = os.path.join(work, f"client_{partition}")
        run = base.train(data, output=own, rank=rank, alpha=2 * rank, seed=seed, progress=False, **beneath, **settings)
        adapter = run.adapter
        if float(asked["clip"]) > 0:
            # Noise out of the system's random numbers: what was sent cannot be drawn again.
            sent = os.path.join(work, "sent")
            base._run("federate private", [f"--adapter={own}", f"--clip={asked['clip']}", f"--noise={asked['noise']}", f"--output={sent}"])
            adapter = Adapter.load(sent)
        told = MetricRecord({"partition": partition, "rows": int(run.result["rows"]), "loss": float(run.losses[-1])})
        return Message(RecordDict({"adapter": _packed(adapter), "told": told}), reply_to=message)


def round_seed(seed: int, server_round: int, client: str) -> int:
    """The seed of a client in a round, as `lorimer federate simulate` has it."""
    return command("federate seed", seed=seed, round=server_round, client=client)["seed"]


def epsilon(rounds: int, noise: float, delta: float = 1e-5) -> float:
    """The privacy loss of a client's whole data after so many rounds with that noise, by dp-accounting (`pip install dp-accounting`)."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    # Exchanging a client's data moves a clipped change by up to twice the norm, which the library does not count.
    accountant.compose(GaussianDpEvent(noise / 2), rounds)
    return accountant.get_epsilon(delta)
