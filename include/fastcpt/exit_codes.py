"""How a job's script ends, beside 0 and 1: whether running it again can help. No torch."""

CANNOT_HEAL = 78  # sysexits.h EX_CONFIG: running it again would end the same way
STOPPED = 143  # as a shell reports SIGTERM
