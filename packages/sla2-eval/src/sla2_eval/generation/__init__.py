"""From a model and prompts to video files."""
