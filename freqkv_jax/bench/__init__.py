"""Measuring speed: what `freqkv bench` runs, with the device's own limits measured beside it."""
