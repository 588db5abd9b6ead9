"""The same examples in every run, however busy the machine: a property that fails must fail again."""

from hypothesis import settings

settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")
