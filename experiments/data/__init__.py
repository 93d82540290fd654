"""Where records come from: text as bytes, data cards, baselines and the batches of one process."""
