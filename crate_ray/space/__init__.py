"""The space of a sweep: its points, what they may be, and which comes next. Arithmetic; neither Ray nor a run folder here."""
