"""Training loops: transformers' Trainer, with exact sums instead of means."""
