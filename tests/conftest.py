"""Settings shared by all tests."""

import os

from hypothesis import settings

# The same examples in every run, so that a failure points at the change that made it.
# HYPOTHESIS_PROFILE=search looks at new ones each time.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
