"""What `experiments.compile_check` compiles for chips that are not here, and how it judges it."""
