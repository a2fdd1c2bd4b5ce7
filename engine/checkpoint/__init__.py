"""What a run keeps, and how it resumes."""
