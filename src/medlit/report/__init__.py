"""A test run for people: one page with every number, every doubt and every system that answered the same notes."""
