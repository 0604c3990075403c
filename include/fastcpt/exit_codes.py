"""Exit codes of a job besides 0 and 1. No imports: the agent, the trainer and Airflow's side share it."""

CANNOT_HEAL = 78  # sysexits.h EX_CONFIG: running it again would end the same way
STOPPED = 143  # as a shell reports SIGTERM
