"""The Llama decoder and its attention."""
