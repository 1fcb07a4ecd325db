"""What is asked of an index: a query, what unrelated queries reach, and what a query retrieves from the pictures."""
