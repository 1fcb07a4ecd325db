"""The store of several machines: PostgreSQL with pgvector."""
