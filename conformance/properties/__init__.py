"""What must hold of every implementation: a file for each subject, `test_<subject>.py`."""
