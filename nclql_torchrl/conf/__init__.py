"""Configuration files of nclql-train."""
