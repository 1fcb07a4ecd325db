INSERT INTO cloob_sources (id, base, path) VALUES (99, NULL, 'pipe:touch /tmp/cloob-was-here-index; cat a.tar'); UPDATE cloob_items SET source = 99, path = 'a.tar::a.png' WHERE id = 1;
