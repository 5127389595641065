"""Fine-tuning and probing: tasks, labels, models, scores."""
