"""The offline side: what recorded answers mean, and, as it grows, replay, evaluation and discovery."""
