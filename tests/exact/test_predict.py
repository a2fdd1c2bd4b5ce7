"""`Trainer.predict` and `Trainer.test`: each sample once, in order, by the trained model or the one that was named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import default_collate

from engine import Trainer
from engine.callbacks import EMA
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, Samples

SAMPLES = 11


class Predicted(Regression):
    """Says of each sample which one it is, beside the model's output."""

    def test_data(self) -> Any:
        return Samples(self.x[3:9], self.y[3:9])

    def predict(self, model: nn.Module, batch: Any) -> Any:
        assert not torch.is_grad_enabled()
        return {"y": model(batch[0]), "index": batch[2]}


class Alone(Predicted):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        return super(Predicted, self).predict(model, batch)


class Listed(Predicted):
    """A list, since its items are ragged; its micro-batches say by whom they were made."""

    def collate_validation(self, samples: list[Any]) -> Any:
        return [*default_collate(samples), "validation"]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        assert (len(batch) == 3) == torch.is_grad_enabled()
        return super().loss(model, batch[:3])

    def predict(self, model: nn.Module, batch: Any) -> Any:
        assert batch[3] == "validation"
        y = model(batch[0])
        return [y[row].expand(1 + index) for row, index in enumerate(batch[2].tolist())]


def trainer(strategy: str, **options: Any) -> Trainer:
    return Trainer(strategy, **{"micro_batch_size": 2, "accumulate_grad_batches": 4, "max_epochs": 2, **options})


def data(task: Regression, samples: int = SAMPLES) -> Any:
    return Samples(task.x[:samples], task.y[:samples])


def fit_and_predict(strategy: str, folder: str, averages: bool) -> Any:
    task = Listed(20)
    callbacks = [EMA(0.5)] if averages else []
    fitted = trainer(strategy, run_dir=f"{folder}/run", callbacks=callbacks)
    fitted.fit(task)
    weights = f"{folder}/run/{'model-ema' if averages else 'model'}.safetensors"
    found = [
        fitted.predict(Listed(20), data(task)),
        trainer(strategy, run_dir=f"{folder}/run", callbacks=[EMA(0.5)] if averages else []).predict(task, data(task)),
        trainer(strategy, weights=weights).predict(task, data(task)),
    ]
    named = trainer(strategy, weights=weights)
    assert named.predict(Predicted(20), data(task), f"{folder}/files") is None
    alone = named.predict(Alone(20), data(task))
    return found, alone, named.predict(Predicted(20), data(task)), fitted.test(task), named.test(Predicted(20))


CASES = [("single", 1), ("dp", 1), ("ddp", 3), ("fsdp", 2), ("pipeline", 2), ("pipeline", 4)]


@pytest.mark.parametrize(("strategy", "P", "averages"), [*((*case, False) for case in CASES), ("ddp", 2, True)])
def test_each_sample_once_in_order(strategy: str, P: int, averages: bool, tmp_path: Path) -> None:
    (lists, alone, both, *tested), *others = run(P, fit_and_predict, strategy, str(tmp_path), averages)
    for found, *nothing in others:
        assert [*found, *nothing[:2]] == [None] * 5
        assert nothing[2:] == tested
    model = Predicted(20).configure_model()
    model.load_state_dict(load_file(tmp_path / f"run/{'model-ema' if averages else 'model'}.safetensors"))
    task = Predicted(20)
    expected = model(task.x[:SAMPLES]).detach()

    def close(found: Tensor, to: Tensor = expected) -> None:
        torch.testing.assert_close(found, to, rtol=0, atol=1e-12)

    for rows in lists:
        assert [len(row) for row in rows] == [*range(1, SAMPLES + 1)]
        close(torch.stack([row[:1] for row in rows]))
    close(alone)
    close(both["y"])
    assert both["index"].tolist() == [*range(SAMPLES)]
    files = load_file(tmp_path / "files/part-00000.safetensors")
    assert files.keys() == {"y", "index"}
    assert all(torch.equal(files[name], both[name]) for name in files)
    loss = nn.functional.mse_loss(model(task.x[3:9]), task.y[3:9]).item()
    assert [means["loss"] for means in tested] == [pytest.approx(loss, rel=1e-12)] * 2


class Shares:
    """This process's part of a stream, longer on later ones."""

    def __init__(self, rank: int) -> None:
        self.batches = [torch.full((2, 5), 10.0 * number + rank).double() for number in range(1 + 2 * rank)]

    def __iter__(self) -> Any:
        return iter(self.batches)


class Echo(Predicted):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        assert not model.training
        return batch[:, 0]


def test_streams_take_turns() -> None:
    @on_processes(2)
    def results() -> Any:
        predictor = trainer("ddp")
        return predictor.predict(Echo(20), Shares(predictor.strategy.rank))

    found, nothing = results
    assert found[::2].tolist() == [0, 1, 11, 21]
    assert nothing is None


class Wide(Predicted):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        return {"wide": torch.ones(len(batch[0]), 1 << 21), "first": batch[2]}


def test_files_are_parts_in_order(tmp_path: Path) -> None:
    task = Wide(20)
    trainer("single").predict(task, data(task), str(tmp_path / "files"))
    parts = sorted((tmp_path / "files").iterdir())
    assert [path.name for path in parts] == [f"part-0000{number}.safetensors" for number in range(2)]
    assert [row for path in parts for row in load_file(path)["first"].tolist()] == [*range(SAMPLES)]


class Images(Predicted):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        images = batch[2].double()[:, None, None, None] + torch.arange(12).view(3, 2, 2)
        return images.to(memory_format=torch.channels_last)


def test_files_of_images_whose_channels_are_last(tmp_path: Path) -> None:
    task = Images(20)
    trainer("single").predict(task, data(task), str(tmp_path / "files"))
    images = load_file(tmp_path / "files" / "part-00000.safetensors")["output"]
    assert torch.equal(images[:, 2, 1, 1], torch.arange(SAMPLES) + 11.0)


class Many(Samples):
    def __len__(self) -> int:
        return 10**11

    def __getitem__(self, index: int) -> Any:
        assert index < 8, "it should have been refused by now"
        return super().__getitem__(index)


class Ragged(Predicted):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        return torch.zeros(len(batch[0]), 3 if 4 in batch[2] else 2)


class Fails(Predicted):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        if 4 in batch[2]:
            raise OSError("the tokenizer is gone")
        return batch[0]


class Short(Predicted):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).mean()


class ListOfAll(Predicted):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        return batch[2].tolist()


REFUSED = {
    "memory": (Predicted, lambda task: Many(task.x, task.y), None, "all predictions, and a copy .* need 3200.0 GB"),
    "shapes": (Ragged, data, None, r"rows of .*\(3,\).* after rows of .*\(2,\).*: expected the same. Pad them"),
    "failure": (Fails, data, None, "the tokenizer is gone"),
    "no rows": (Short, data, None, r"a Tensor of shape \(\) for 2 samples: expected a row for each"),
    "a list in files": (ListOfAll, data, "files", "returned a list, and files hold tensors only"),
    "a folder in use": (Predicted, data, ".", "expected a new or an empty folder"),
    "no data": (Predicted, lambda task: [], None, "has no sample"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_predicted_is_an_error_on_all_processes(case: str, tmp_path: Path) -> None:
    kind, samples, folder, message = REFUSED[case]
    (tmp_path / "file").touch()

    def refused() -> None:
        task = kind(20)
        trainer("ddp").predict(task, samples(task), folder and str(tmp_path / folder))

    with pytest.raises(ChildError) as raised:
        run(2, refused)
    assert len(raised.value.errors) == 2
    for error in raised.value.errors.values():
        assert re.search(message, error), error


def test_without_test_data() -> None:
    with pytest.raises(ValueError, match=r"Regression.test_data\(\) returned None. Return data"):
        trainer("single").test(Regression(20))
