"""Fine-tuning: config, data, step, checkpoints and the loop."""
