"""Files for which being imported is what matters: each is loaded alone, in a process of its own."""
