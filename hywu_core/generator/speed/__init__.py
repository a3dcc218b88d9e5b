"""What makes a generator fast and small. Nothing here changes what is computed."""
