"""Other libraries' data, stopped in the middle of an epoch and resumed: prints the table of docs/data-sources.md.

pip install datasets torchdata webdataset && python -m tests.data.try_loaders [WORD ...]
"""

from __future__ import annotations

import io
import random
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from tests.kit.resuming import SAMPLES, N, resumed

FOLDER = Path(tempfile.mkdtemp())


def columns() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"id": list(range(SAMPLES))}).with_format("torch")


def streamed(rank: int, P: int) -> Any:
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(columns().to_iterable_dataset(num_shards=8), rank, P)


class ByState:
    """What `datasets` itself can resume."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.set_epoch, self.state_dict = stream.set_epoch, stream.state_dict
        self.load_state_dict = stream.load_state_dict

    def __iter__(self) -> Any:
        return iter(self.stream)


def stateful(data: Any, workers: int = 0, **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(data, batch_size=N, num_workers=workers, **options)


def shared(rank: int, P: int, workers: int) -> Any:
    data = columns()
    return stateful(data, workers, sampler=DistributedSampler(data, P, rank))


def shards() -> list[str]:
    paths = [FOLDER / f"{number}.tar" for number in range(8)]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        with tarfile.open(path, "w") as tar:
            for place in range(number, SAMPLES, len(paths)):
                text = str(place).encode()
                info = tarfile.TarInfo(f"{place:04}.cls")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    return [str(path) for path in paths]


def web(rank: int, P: int, shuffles: str = "", workers: int = 0) -> Any:
    import webdataset as wds

    def of_this_process(urls: Any) -> Any:
        return list(urls)[rank::P]

    steps = [wds.SimpleShardList(shards()), of_this_process, wds.split_by_worker, wds.tarfile_to_samples()]
    if shuffles == "random":  # the module: the engine seeds it at each epoch
        steps.append(wds.shuffle(64, rng=random))
    if shuffles == "its own":
        steps.append(wds.shuffle(64))
    if shuffles == "detshuffle":
        steps.append(wds.detshuffle(64))
    pipeline = wds.DataPipeline(*steps, wds.decode(), wds.rename(id="cls"), wds.batched(N, collation_fn=ids))
    return DataLoader(pipeline, batch_size=None, num_workers=workers)


def ids(samples: list[Any]) -> Any:
    return {"id": torch.tensor([sample["id"] for sample in samples])}


PAIRS: dict[str, Callable[[int, int], Any]] = {
    "datasets.Dataset": lambda rank, P: columns(),
    "IterableDataset.batch by its state": lambda rank, P: ByState(streamed(rank, P).batch(N)),
    "DataLoader(IterableDataset.batch, batch_size=None)": lambda rank, P: DataLoader(
        streamed(rank, P).batch(N), batch_size=None
    ),
    "DataLoader of IterableDataset": lambda rank, P: DataLoader(streamed(rank, P), N),
    "DataLoader of IterableDataset, 2 workers": lambda rank, P: DataLoader(streamed(rank, P), N, num_workers=2),
    "DataLoader of IterableDataset.shuffle, 2 workers": lambda rank, P: DataLoader(
        streamed(rank, P).shuffle(0, buffer_size=64), N, num_workers=2
    ),
    "StatefulDataLoader of Dataset": lambda rank, P: shared(rank, P, 0),
    "StatefulDataLoader of Dataset, 2 workers": lambda rank, P: shared(rank, P, 2),
    "StatefulDataLoader of IterableDataset": lambda rank, P: stateful(streamed(rank, P)),
    "StatefulDataLoader of IterableDataset, 2 workers": lambda rank, P: stateful(streamed(rank, P), 2),
    "WebDataset": web,
    "WebDataset, 2 workers": lambda rank, P: web(rank, P, workers=2),
    "WebDataset, shuffle(64)": lambda rank, P: web(rank, P, "its own"),
    "WebDataset, shuffle(64, rng=random)": lambda rank, P: web(rank, P, "random"),
    "WebDataset, detshuffle(64)": lambda rank, P: web(rank, P, "detshuffle"),
}


def verdict(whole: list[Any], rest: list[Any]) -> str:
    if whole == rest:
        return "right"
    want, got = (Counter(sample for updates in rows for ids in updates for sample in ids) for rows in (whole, rest))
    if want == got:
        return "each once, in another order"
    return f"{(want - got).total()} of {want.total()} missing, {(got - want).total()} too often"


if __name__ == "__main__":
    named = {name: version(name) for name in ("torch", "datasets", "torchdata", "webdataset")}
    print(", ".join(f"{name} {number}" for name, number in named.items()))
    print("| pair | 1 process | 2 processes |\n|---|---|---|")
    for name, make in PAIRS.items():
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        found = []
        for P in (1, 2):
            try:
                found.append(verdict(*resumed(make, P, Path(tempfile.mkdtemp()) / "run")))
            except AssertionError as error:
                found.append("refused: " + str(error).strip().splitlines()[-1][:300])
        print(f"| {name} | {found[0]} | {found[1]} |", flush=True)
