"""Finds the best way to serve a large language model on a GPU cluster, by measuring."""

import os

# Before NumPy is loaded. The matrices of a search are small: threads of the linear algebra wait for each other, and for
# the cores that engines or other programs have, longer than they compute. A value that the user has set holds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
