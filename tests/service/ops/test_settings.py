"""Settings come from variables and the command line; a wrong one is named."""

from __future__ import annotations

import pytest

from placement.errors import InputError
from service.settings import read_settings


def test_what_kubernetes_sets_is_not_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service of that name puts a URL into MOE_PLACEMENT_PORT of every pod; PORT is not ours either."""
    monkeypatch.setenv("MOE_PLACEMENT_PORT", "tcp://10.0.0.1:8700")
    monkeypatch.setenv("PORT", "80")
    settings = read_settings(port=None)
    assert settings.port == 8700
    assert settings.environment()["MOE_PLACEMENT_LISTEN_PORT"] == "8700"


def test_the_command_line_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given beats the variable, and a child process reads the same settings."""
    monkeypatch.setenv("MOE_PLACEMENT_LISTEN_PORT", "9001")
    assert (read_settings().port, read_settings(port=9002).port) == (9001, 9002)
    for name, value in read_settings(port=9002, max_threads=3).environment().items():
        monkeypatch.setenv(name, value)
    assert (read_settings().port, read_settings().max_threads) == (9002, 3)


@pytest.mark.parametrize(
    ("variables", "given", "named"),
    [
        ({"MOE_PLACEMENT_LISTEN_PORT": "x"}, {}, "MOE_PLACEMENT_LISTEN_PORT: "),
        ({}, {"port": 99999}, "--port: "),
        ({"MOE_PLACEMENT_MAX_THREADS": "0"}, {}, "MOE_PLACEMENT_MAX_THREADS: "),
    ],
)
def test_a_wrong_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], given: dict[str, int], named: str
) -> None:
    """The message begins with where the value came from."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        read_settings(**given)
    assert str(caught.value).startswith(named)
