"""The offline side: answers, recordings, the replay store, evaluation, search for controllers and their promotion."""
