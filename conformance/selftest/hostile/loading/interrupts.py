"""A file that pretends while it is imported that the user has had enough."""

raise KeyboardInterrupt
