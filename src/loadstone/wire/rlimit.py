"""The process's limit of open files: at the usual soft limit of 1,024 it looks like a full server."""

import resource

_PLENTY = 1_048_576


def raise_open_files() -> int:
    """Raise the soft limit to the hard one (at most 1,048,576) and return the soft limit then in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _PLENTY if hard == resource.RLIM_INFINITY else min(hard, _PLENTY)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft
