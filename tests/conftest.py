"""Options of the test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --update-golden` writes the golden files anew, to be reviewed as a diff."""
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")
