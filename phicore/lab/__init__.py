"""Looking at models and backends: benchmarks, parity, traces, inspection, and what they need."""
