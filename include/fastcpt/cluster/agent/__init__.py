"""The agent: what runs on the cluster, with the standard library of Python 3.8 or newer alone.

It is not installed there. ``remote.ask`` sends it as one program (``program.text``) with one JSON
request through ``ssh host python3 -`` and reads one JSON answer. So both sides always have the same
version, and no shell interprets user input. The same program, written into a job's folder as
``supervisor.py``, runs that job: a job keeps the version that started it.

    <root>/jobs/<name>/   job.sh, spec.json, secrets.json (0600), job.log, status.json, lock

Only the supervisor holds the locks. A job is over when all its processes are. They carry the job's
folder in their environment, so they are found and ended even after they left its process group.
Watching or ending a job works on a full disk; notes are written if there is room. A job that died
without a final status is detected by its supervisor's pid or a changed boot id. Under Slurm the
supervisor runs inside the allocation, and the queue tells the state of a job that waits or was ended.
"""
