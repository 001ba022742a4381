"""Raw rows: Criteo's text logs and users' tables, read as typed pieces."""
