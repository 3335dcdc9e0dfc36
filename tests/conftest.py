"""What holds for every test, and for the processes that tests start."""

import os

# Times of tiny models say nothing, and are not what tests look at.
os.environ.setdefault("EXPORT_VQ_BENCH_SECONDS", "0.01")
