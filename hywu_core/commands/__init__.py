"""`hywu inspect`, `hywu condition`, `hywu generate`, `hywu convert`."""
