# The image of docker-services.yaml: Airflow, rsync and OpenSSH, every Python package pinned, and the project's code:
# a container runs one version of it, whatever is checked out beside meanwhile.
FROM apache/airflow:3.3.2-python3.11
USER root
RUN apt-get update && apt-get install -y --no-install-recommends rsync openssh-client curl \
    && rm -rf /var/lib/apt/lists/*
USER airflow
COPY requirements.txt requirements-compose.txt requirements-celery.txt /
RUN pip install --no-cache-dir -r /requirements.txt -r /requirements-compose.txt -r /requirements-celery.txt
# readable by whoever runs the containers, also where it was checked out under umask 077
COPY --chmod=755 requirements-cluster*.txt /opt/fast_cpt/
COPY --chmod=755 include /opt/fast_cpt/include
COPY --chmod=755 plugins /opt/fast_cpt/plugins
COPY --chmod=755 dags /opt/fast_cpt/dags
