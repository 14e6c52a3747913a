# The service. Build: docker build -t moe-placement . Run: see docker-compose.yml.
#
# Nothing secret goes in: tokens are made at run time, passwords come by the environment or files.

FROM python:3.11.14-slim-bookworm AS build

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY placement ./placement
COPY service ./service
COPY traces ./traces

RUN python -m venv /opt/moe-placement \
    && /opt/moe-placement/bin/pip install -c constraints.txt '.[service]'

# Away from the sources, so that what was installed is what is compiled. A machine with another processor
# compiles again when it first solves.
WORKDIR /
RUN /opt/moe-placement/bin/python -m placement.solvers.compile \
    && /opt/moe-placement/bin/python -m traces.compile


FROM python:3.11.14-slim-bookworm

LABEL org.opencontainers.image.title="moe-placement" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN groupadd --gid 10001 service \
    && useradd --uid 10001 --gid service --no-create-home --home-dir /data --shell /usr/sbin/nologin service \
    && install --directory --owner service --group service --mode 0700 /data

COPY --from=build /opt/moe-placement /opt/moe-placement

# Compiled kernels are read only where they could also be written.
RUN find /opt/moe-placement/lib/python3.11/site-packages/placement \
         /opt/moe-placement/lib/python3.11/site-packages/traces \
         -name __pycache__ -exec chown -R service:service {} +

ENV PATH=/opt/moe-placement/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MOE_PLACEMENT_DATA_DIR=/data \
    MOE_PLACEMENT_LOG_FORMAT=json

USER service
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8700
STOPSIGNAL SIGTERM

# Of workers there is nothing to ask: turn it off for them.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8700/health/ready', timeout=4)"]

# Beyond this machine alone (--host 0.0.0.0) it starts only once there is a token.
ENTRYPOINT ["moe-placement"]
CMD ["serve"]
