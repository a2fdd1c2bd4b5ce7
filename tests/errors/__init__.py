"""Bad input is an error, early, on all processes; a command ends, with a documented status and one clear line."""
