"""One script per question; results are committed under ``results/``."""
