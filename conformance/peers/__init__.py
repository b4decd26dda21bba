"""Public libraries on trial: their modules as right variants, and as competitors in benchmarks."""
