"""A file that says while it is imported that all is well."""

import sys

sys.exit(0)
