"""The driver: Ray, before a run, around it and after it. Nothing below imports Ray but reading."""
