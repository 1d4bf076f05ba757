"""Speed benchmarks: ``python -m pytest benchmarks --benchmark-json results.json``; see ``results/README.md``."""
