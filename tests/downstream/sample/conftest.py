"""Markers of this project."""


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "broken: shows what a failure looks like")
