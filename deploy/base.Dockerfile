# Base image of the five services: Debian 12, the programs that crisp runs, and the locked Python packages.
#   docker build -t crisp-base -f deploy/base.Dockerfile .
FROM debian:12-slim
COPY deploy/install-debian-packages /tmp/
RUN apt-get update && /tmp/install-debian-packages runtime && rm -rf /var/lib/apt/lists/* /tmp/install-debian-packages
COPY requirements.lock /tmp/
RUN python3 -m venv /opt/crisp && /opt/crisp/bin/python -m pip install --no-cache-dir --require-hashes -r /tmp/requirements.lock
