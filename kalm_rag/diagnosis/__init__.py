"""Checks an installation and a model on this machine: the library behind `kalm-rag doctor`."""
