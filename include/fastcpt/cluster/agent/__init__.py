"""What runs on the cluster: modules of the standard library alone, for any Python from 3.8.

They are not installed there. ``remote.ask`` sends them as one program (``program.text``) through
``ssh host python3 -`` together with one request (JSON) and reads one answer (JSON), so both sides are
always of one version and nothing a user typed is ever interpreted by a shell. The same program, written
into a job's folder as ``supervisor.py``, runs that job: a job keeps the version that started it.

    <root>/jobs/<name>/   job.sh, spec.json, secrets.json (0600), job.log, status.json, lock

The locks are the supervisor's alone: a job is over when its processes are, and those carry the
job's folder in their environment, so that they are found and ended wherever they fled to. What ends
or watches a job needs no room on the disk: notes are kept where there is some. A job that ends
without saying so is seen by its supervisor's pid or the host's other boot id. Under Slurm the
supervisor runs inside the allocation, and the queue answers for it while it waits or was ended.
"""
