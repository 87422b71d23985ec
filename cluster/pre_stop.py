"""End the jobs of a Ray cluster whose head is about to go: `python -m cluster.pre_stop [SECONDS]` on the head, in a preStop hook.

Each job is stopped as `ray job stop` does it, so that it journals what is finished, and the same command goes on with it later.
That takes 2 to 8 seconds a job, all of them at once; SECONDS is how long to wait for it.
"""

from __future__ import annotations

import os
import sys
import time

DASHBOARD = "http://127.0.0.1:8265"
WAIT_S = 12.0
POLL_S = 0.25


def stop_jobs(address: str, wait_s: float) -> list[str]:
    """Stop the jobs that run, and wait until they have ended.

    Args:
        address: of the head's dashboard, `http://host:port`.
        wait_s: for all of them together.

    Returns:
        The submission ids of those that had not ended by then.
    """
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    ids = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    for submission_id in ids:
        client.stop_job(submission_id)
    deadline = time.monotonic() + wait_s
    while ids and time.monotonic() < deadline:
        time.sleep(POLL_S)
        ids = [each for each in ids if not client.get_job_status(each).is_terminal()]
    return ids


def main() -> int:
    """Stop the jobs of the head on this machine; 0 where all have ended."""
    wait_s = float(sys.argv[1]) if len(sys.argv) > 1 else WAIT_S
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    try:
        left = stop_jobs(address, wait_s)
    except ConnectionError as error:
        print(f"no job is stopped: {error}", file=sys.stderr)
        return 1
    for submission_id in left:
        print(f"{submission_id} has not ended within {wait_s:g} s", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
