"""Implementations on several devices: what each rank gets and gives, the processes they run in, and how their ends are told."""
