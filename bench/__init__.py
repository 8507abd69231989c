"""Benchmarks, installed as `lopt.bench` and run by `lopt bench`; results.csv collects their rows."""
