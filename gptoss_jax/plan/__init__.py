"""What a model would take on devices that need not be there: memory, time and collectives, from compiled programs."""
