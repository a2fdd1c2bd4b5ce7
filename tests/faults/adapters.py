"""Faults of engine/adapters."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "count padding as predicted tokens",
        "_Pretrained._column",
        'IGNORED if name == "labels" else',
        'self._pad if name == "labels" else',
        "'tests/adapters/test_transformers.py::test_an_update_is_that_of_its_big_batch[pairs-1]'",
    ),
    Fault(
        "let the decoder read what it is to predict",
        "Seq2SeqLM.loss",
        "= shifted(labels)",
        "= labels.clamp(min=0)",
        "'tests/adapters/test_transformers.py::test_an_update_is_that_of_its_big_batch[pairs-1]'",
    ),
    Fault(
        "end a micro-batch of a Lightning module one late",
        "Hooks.on_update_end",
        "self._end_batch()",
        "pass",
        "tests/adapters/test_lightning_hooks.py -k another_kind",
    ),
    Fault(
        "log the metric of one process",
        "engine.adapters.lightning_run:_joined",
        "for other in values[1:]:",
        "for other in values[:0]:",
        "tests/adapters/test_lightning_hooks.py -k metric_object",
    ),
    Fault(
        "forget where a Lightning module's epoch stood",
        "Hooks.load_state_dict",
        'self._saved_index = state["index"]',
        "pass",
        "tests/adapters/test_lightning_hooks.py -k interrupted",
    ),
    Fault(
        "move no scheduler of a Lightning module by epoch",
        "Hooks.on_epoch_end",
        'self._move("epoch", trainer.epoch + 1, trainer.metrics)',
        "pass",
        "tests/adapters/test_lightning_hooks.py -k schedulers",
    ),
    Fault(
        "balance experts over padding too",
        "MoECausalLM.outputs",
        '{"chosen": (chosen * mask).sum((0, 1))',
        '{"chosen": chosen.sum((0, 1))',
        "tests/adapters/test_moe.py -k window",
    ),
    Fault(
        "let a causal model predict the token that it reads",
        "CausalLM._predict",
        "labels[:, 1:], (0, 1)",
        "labels, (0, 0)",
        "tests/adapters/test_transformers.py::test_an_update_is_that_of_its_big_batch",
    ),
]
