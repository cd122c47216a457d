"""The report on a cache: ``teacher-cache report``."""
