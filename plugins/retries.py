"""Which failures are retried: a lost connection is, a wrong recipe or document is not."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import ExceptionRetryPolicy, RetryRule
from airflow.sdk.definitions.retry_policy import RetryAction

# Retrying does not help against a wrong recipe, document or host key, or a bug.
CANNOT_HEAL: list[type[BaseException] | str] = [
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    ImportError,
    AssertionError,
]
RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(exception=CANNOT_HEAL, action=RetryAction.FAIL, reason="does not heal by itself"),
        RetryRule(exception=OSError, action=RetryAction.RETRY, retry_delay=timedelta(seconds=30)),
    ]
)
# For every task that reads, sends or waits.
RETRIES = {"retries": 3, "retry_delay": timedelta(minutes=1), "retry_policy": RETRY_POLICY}
