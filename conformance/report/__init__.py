"""What the user sees of the gate's verdicts: the terminal, files for CI, a page, the difference of two runs, the catalogue."""
