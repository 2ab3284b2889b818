"""Models of other libraries, to measure against in the same run."""
