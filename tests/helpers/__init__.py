"""What several test files share: tiny models and their data, kernel problems, child processes."""
