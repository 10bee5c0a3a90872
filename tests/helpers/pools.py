"""Stand in for a pool of processes."""

from concurrent.futures import Future


class Pool:
    """Does in this process, at once, what it is given."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *given) -> Future:
        future = Future()
        future.set_result(work(*given))
        return future


def here(workers: int) -> Pool:
    """Take the place of `benchmarks.harness.parallel.pool`."""
    return Pool()
