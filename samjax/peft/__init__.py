"""Parameter-efficient fine-tuning on plain parameter trees."""
