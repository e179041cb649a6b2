"""Evaluations: perplexity of long text, the data it reads and the result file it writes."""
