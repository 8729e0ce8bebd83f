"""Side-by-side measurements: `python -m benchmarks.<name> [--quick]`, the last line one JSON object."""
