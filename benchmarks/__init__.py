"""Measurements of shmcast against what people do today; README.md says what is measured, and how to read it."""
