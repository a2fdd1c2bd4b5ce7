"""A pytest fixture: `pytest_plugins = "engine.audit.fixture"` in a conftest.py brings `assert_exact`."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.audit.cases import Adapter, Job
from engine.audit.report import audit


@pytest.fixture
def assert_exact() -> Callable[..., None]:
    """Return a function with the arguments of `audit`; it fails with the table unless each case is exact."""

    def check(adapter: Adapter | Callable[[Job], object], **options: Any) -> None:
        report = audit(adapter, **options)
        if not report.exact:
            pytest.fail(f"the gradient is not that of one big batch\n\n{report.text()}", pytrace=False)

    return check
