"""An index in one folder: SQLite is the truth, matrices and faiss indices are caches of it."""
