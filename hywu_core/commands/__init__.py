"""`hywu inspect`, `hywu generate`, `hywu convert`."""
