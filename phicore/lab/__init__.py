"""Tools to examine models and backends: benchmarks, parity, traces, inspection, scaffolding."""
