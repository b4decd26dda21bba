"""What is compared with what, and what is said of it."""
