# The image of docker-compose.yaml: Airflow, rsync and OpenSSH, every Python package pinned and installed at build.
FROM apache/airflow:3.3.2-python3.11
USER root
RUN apt-get update && apt-get install -y --no-install-recommends rsync openssh-client curl \
    && rm -rf /var/lib/apt/lists/*
USER airflow
COPY requirements.txt requirements-compose.txt /
RUN pip install --no-cache-dir -r /requirements.txt -r /requirements-compose.txt
