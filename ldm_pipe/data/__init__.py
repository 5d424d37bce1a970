"""Pictures and captions: reading, checking, ordering and caching what the trainings use."""
