"""Load on a served release, and what it measures: `python -m load`, or `make bench`."""
