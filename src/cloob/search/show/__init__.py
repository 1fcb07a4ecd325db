"""Pictures for people: thumbnails, a contact sheet, pictures in a terminal, and a map of the collection."""
