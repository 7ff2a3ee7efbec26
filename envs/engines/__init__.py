"""Engines: each steps a batch of environments. They are imported when they are asked for."""
