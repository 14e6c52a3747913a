"""The files for containers: they parse, name what exists, hold no secret, and their commands run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from placement import __version__
from tests.service.server import ROOT, Server, eventually

DEPLOY = ROOT / "service" / "deploy"
INSTRUCTIONS = {"FROM", "RUN", "CMD", "LABEL", "EXPOSE", "ENV", "COPY", "ENTRYPOINT", "VOLUME", "USER"}
INSTRUCTIONS |= {"WORKDIR", "STOPSIGNAL", "HEALTHCHECK"}
REQUIRED = re.compile(r"\$\{\w+:\?[^}]+\}")


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def composed() -> dict[str, Any]:
    """Return the compose file."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return found


def test_the_dockerfile_parses() -> None:
    """Known instructions, pinned images, lists where lists are meant, and no root at the end."""
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    images = [rest.split()[0] for name, rest in found if name == "FROM"]
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image) for image in images)
    for name, rest in found:
        if name in {"ENTRYPOINT", "CMD"}:
            assert all(isinstance(part, str) for part in json.loads(rest))
        if name == "RUN":
            shlex.split(rest)
    (health,) = [rest for name, rest in found if name == "HEALTHCHECK"]
    _, _, command = health.partition("CMD ")
    compile(json.loads(command)[2], "healthcheck", "exec")
    assert [rest for name, rest in found if name == "USER"][-1] not in {"root", "0"}


def test_the_dockerfile_copies_what_is_there() -> None:
    """And what .dockerignore lets through."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored


def test_the_image_holds_no_secret() -> None:
    """Neither built in, nor copied along."""
    for name, rest in instructions():
        if name in {"ENV", "ARG", "LABEL"}:
            assert not re.search(r"PASSWORD|TOKEN|SECRET|DATABASE_URL", rest)
    assert "*" in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()


def test_the_compose_file_names_what_is_there() -> None:
    """Files, volumes, secrets and services that are named exist, images are pinned."""
    found = composed()
    services = found["services"]
    assert set(services) == {"postgres", "api", "worker", "prometheus", "grafana"}
    for about in services.values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-\w+)?", about["image"])
        assert set(about.get("depends_on", ())) <= set(services)
        assert set(about.get("secrets", ())) <= set(found["secrets"])
        for volume in about.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in found["volumes"]
        for port in about.get("ports", ()):
            assert port.startswith("127.0.0.1:")
    assert services["worker"]["deploy"]["replicas"] == 2
    assert services["api"]["image"] == services["worker"]["image"] == f"moe-placement:{__version__}"


def test_compose_has_no_default_password() -> None:
    """Without one in the environment it refuses to start."""
    for about in composed()["services"].values():
        for name, value in about.get("environment", {}).items():
            if "PASSWORD" in name:
                assert REQUIRED.fullmatch(value), name
            assert not re.search(r"://[^/\s]*:[^/\s]*@", str(value)), name


def test_prometheus_scrapes_the_api_with_its_token() -> None:
    """The target and the file of the token are those of the compose file."""
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = prometheus["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    command = composed()["services"][host]["command"]
    assert command[command.index("--port") + 1] == port
    name = Path(job["authorization"]["credentials_file"]).name
    assert name in composed()["services"]["prometheus"]["secrets"]
    assert "credentials" not in job["authorization"]


def test_grafana_finds_board_and_source() -> None:
    """The provisioning names the same source as the board, and the folder where the board is mounted."""
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasource.yml").read_text(encoding="utf-8"))["datasources"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/boards.yml").read_text(encoding="utf-8"))["providers"]
    assert {target["datasource"]["uid"] for target in targets()} == {source["uid"]}
    assert "prometheus" in composed()["services"]
    assert source["url"] == "http://prometheus:9090"
    mounted = [volume.split(":")[1] for volume in composed()["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/board.json" in mounted


def targets() -> Iterator[dict[str, Any]]:
    """Yield what the board's panels ask for."""
    board = json.loads((DEPLOY / "grafana/board.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        yield from panel["targets"]


def test_every_metric_of_the_board_exists(tmp_path: Path) -> None:
    """In what a real server answers."""
    with Server(tmp_path / "data", role="api") as server:
        httpx.get(f"{server.base_url}/health/live", trust_env=False)
        text = httpx.get(f"{server.base_url}/metrics", trust_env=False).text
    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    known = {
        name + suffix
        for name, kind in families.items()
        for suffix in {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(kind, ("",))
    }
    for target in targets():
        asked = re.findall(r"\b(moe_placement_\w+|process_\w+)", target["expr"])
        assert asked
        assert set(asked) <= known, target["expr"]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_commands_of_compose_run(name: str, tmp_path: Path, postgresql_url: str) -> None:
    """With their arguments and environment, against a PostgreSQL; only addresses are others here."""
    about = composed()["services"][name]
    _, *arguments = about["command"]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    environment = {
        key: "" if value.endswith(":-}") else value.replace("${WORKER_CPUS:-0}", "0")
        for key, value in about["environment"].items()
        if key not in {"DATABASE_URL", "MOE_PLACEMENT_DATA_DIR"}
    }
    url = about["environment"]["DATABASE_URL"]
    assert url.startswith("postgresql+psycopg://")
    with Server(
        tmp_path / "data", role=given["--role"], database_url=postgresql_url, env=environment
    ) as server:
        if name == "worker":
            eventually(lambda: "takes jobs" in server.log)
        assert server.is_running
