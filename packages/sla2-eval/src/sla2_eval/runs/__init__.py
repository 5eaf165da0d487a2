"""What every run needs: settings, progress, results on disk."""
