"""What the command `gaugeblock` ends with."""

CONFORM = 0  # all of it
FAILS = 1  # something does
WRONG_CALL = 2  # or the candidate file is wrong, or the engine failed
NOTHING_TESTED = 3
