"""What a model learns from: loading, splitting and tokenising data for a task."""
