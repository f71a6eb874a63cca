"""Plug-ins for inference engines; each engine has one folder, the only place that may import it."""
