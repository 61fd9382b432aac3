"""How much of a model's quality is left when its prefill is sparse: tasks, methods, and what each answers."""
