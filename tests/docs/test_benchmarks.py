"""The tables of docs/ come from scripts that work: the smallest cases of one, and the places of all."""

from __future__ import annotations

import pytest

from tests.benchmarks.cases import NAMED
from tests.benchmarks.exactness import continued, exactness
from tests.benchmarks.footprint import LAYERS, footprint, least
from tests.benchmarks.run import DOCS, PAGES


def test_a_strategy_is_exact_and_goes_on_elsewhere() -> None:
    assert exactness(NAMED["single"]) < 1e-12
    assert continued(NAMED["single"]) < 1e-12


@pytest.mark.parametrize("name", ["ddp", "fsdp, reshard_after_forward=False", "pipeline, GPipe"])
def test_the_least_that_an_update_can_give_is_what_the_best_give(name: str) -> None:
    N, K, width = 2, 2, 256
    found = footprint(NAMED[name], K, N, width)
    messages = found.given.pop("messages")
    assert 0 < messages < 1024
    assert found.given.total() == least(NAMED[name], K, N, width)
    assert found.state >= 4 * LAYERS * width**2 / 2**20  # of AdamW, on one of at most two processes


@pytest.mark.parametrize("P", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_small_gpt2_ends_alike_with_all_who_train_it(P: int) -> None:
    for package in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(package)
    from tests.benchmarks import gpt2

    names = [name for name in gpt2.CONTENDERS if name != "plain loop, again"]
    tiny = gpt2.GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2, **gpt2.OFF)
    found = gpt2.compare(names, tiny, P, updates=4)
    assert list(found) == names
    assert all((found[name] > 0).all() for name in names)


def test_each_script_has_its_place_on_a_page() -> None:
    for name, page in PAGES.items():
        text = (DOCS / page).read_text()
        assert text.index(f"<!-- {name} -->\n") < text.index(f"<!-- /{name} -->\n")
