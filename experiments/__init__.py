"""Everything that runs: data, training, evaluation, generation, benchmarks and reports."""
